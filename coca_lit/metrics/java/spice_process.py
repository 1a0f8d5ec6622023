"""The process in which SPICE's classes run: started as a script by `spice.Spice`, imports nothing of coca_lit.

Its one argument is JSON: `jvm`, `flags`, `class_path`, `cache` (a folder, or null) and `threads`. Each line on standard
input holds images, [[references, caption], ...]. Lines of JSON answer it: {"scores": [...]} for some images at a time,
in their order, {"warning": text} and, instead of further scores, {"error": text}.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

IMAGES = 16  # that are parsed at a time: a second or two
CATEGORIES = ("Object", "Attribute", "Relation", "Cardinality", "Color", "Size")


def main(jvm: str, flags: Sequence[str], class_path: Sequence[str], cache: str | None, threads: int) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what Java prints must not be taken for an answer

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        score = load(jvm, flags, class_path, cache, threads, lambda text: answer(warning=text))
    except Exception as error:
        answer(error=_reason(error))
        return
    for line in sys.stdin:
        images = json.loads(line)
        try:
            for start in range(0, len(images), IMAGES):
                answer(scores=score(images[start : start + IMAGES]))
        except Exception as error:
            answer(error=_reason(error))


def load(
    jvm: str,
    flags: Sequence[str],
    class_path: Sequence[str],
    cache: str | None,
    threads: int,
    warn: Callable[[str], None],
) -> Callable[[Sequence[Any]], list[dict[str, float | None]]]:
    """Starts Java and returns the scorer of images, each with references and a caption: F-scores by category."""
    import jpype

    jpype.startJVM(jvm, *flags, classpath=list(class_path), convertStrings=True)
    spice = jpype.JPackage("edu").anu.spice
    java = jpype.java
    filters = java.util.HashMap()
    for category in CATEGORIES:
        filters.put(category, getattr(spice.TupleFilter, f"{category.lower()}Filter"))

    def parser(cache: str | None) -> Any:
        parser = spice.SpiceParser(cache, threads, True)
        parser_class = spice.SpiceParser.class_
        annotator_class = spice.Annotator.class_
        annotator = _opened(parser_class, "annotator").get(parser)
        _opened(annotator_class, "pipeline").set(annotator, pipeline)
        return parser

    properties = java.util.Properties()
    # SPICE's own, without the annotator of named entities: nothing reads what it finds, and it needs large models.
    properties.setProperty("annotators", "tokenize,ssplit,parse,lemma")
    properties.setProperty("depparse.extradependencies", "MAXIMAL")
    properties.setProperty("threads", str(threads))
    pipeline = jpype.JClass("edu.stanford.nlp.pipeline.StanfordCoreNLP")(properties)
    parsers = [parser(cache), *([parser(None)] if cache else [])]

    def score(images: Sequence[Any]) -> list[dict[str, float | None]]:
        while True:
            try:
                return graph_scores(parsers[0], images)
            except Exception as error:
                if len(parsers) == 1:
                    raise
                parsers.pop(0)
                warn(f"SPICE continues without its scene-graph cache in {cache}: {_reason(error)}")

    def graph_scores(parser: Any, images: Sequence[Any]) -> list[dict[str, float | None]]:
        if len(parsers) == 2:  # the cache, which is filled after each call: texts that images share are parsed once
            distinct = dict.fromkeys(text for references, caption in images for text in (*references, caption))
            parser.parseCaptions(java.util.ArrayList(list(distinct)))
        texts = java.util.ArrayList()
        counts = java.util.ArrayList()
        captions = java.util.ArrayList()
        for references, caption in images:
            for text in references:
                texts.add(text)
            counts.add(java.lang.Integer(len(references)))
            captions.add(caption)
        statistics = spice.SpiceStats(filters, False)
        graphs = zip(parser.parseCaptions(captions), parser.parseCaptions(texts, counts), strict=True)
        for i, (own, reference) in enumerate(graphs):
            statistics.score(java.lang.Integer(i), own, reference, True)
        rows = json.loads(statistics.toJSONString())
        return [{name: values["f"] for name, values in row["scores"].items()} for row in rows]

    return score


def _opened(java_class: Any, name: str) -> Any:
    field = java_class.getDeclaredField(name)
    field.setAccessible(True)
    return field


def _reason(error: Exception) -> str:
    """The innermost cause in a few words."""
    cause: Any = error
    while hasattr(getattr(cause, "__cause__", None), "getMessage"):  # JPype ends the chain with a trace of its own
        cause = cause.__cause__
    message = cause.getMessage() if hasattr(cause, "getMessage") else str(cause)  # str of Java's has the class in it
    return f"{type(cause).__name__.rpartition('.')[2]}: {' '.join(str(message).split())}"[:300]


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
