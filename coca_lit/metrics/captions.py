"""Caption metrics against references: BLEU-1..4, METEOR, ROUGE-L, CIDEr and SPICE, equal to the official ones.

The scores are those of pycocoevalcap's own scorers, called one by one: its ``COCOEvalCap`` downloads SPICE before it
computes anything, and its Java wrappers can hang or shift captions (see ``ptb`` and ``meteor``). Another metric is one
more function in ``SCORERS``: it gets the tokenised captions and returns its corpus scores by name.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain, islice
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from coca_lit.metrics.java.meteor import shared_meteor, warm_up
from coca_lit.metrics.java.ptb import ptb_tokenize
from coca_lit.metrics.java.spice import spice, spice_jars

Id = TypeVar("Id", bound=Hashable)
References = Mapping[Any, list[str]]  # image -> its tokenised references
Hypotheses = Mapping[Any, list[str]]  # image -> a list of its one tokenised prediction, as pycocoevalcap wants it


class Tokens(NamedTuple):
    """Tokenised captions of the same images, in the same order."""

    references: References
    hypotheses: Hypotheses

    def of(self, images: Iterable[Hashable]) -> "Tokens":
        """The part of some images."""
        chosen = list(images)
        return Tokens({i: self.references[i] for i in chosen}, {i: self.hypotheses[i] for i in chosen})


def _bleu(references: References, hypotheses: Hypotheses) -> dict[str, float]:
    scores, _ = Bleu(4).compute_score(references, hypotheses, verbose=0)
    return {f"Bleu_{n}": score for n, score in enumerate(scores, start=1)}


def _meteor(references: References, hypotheses: Hypotheses) -> dict[str, float]:
    return {"METEOR": shared_meteor().score(list(references.values()), [text for (text,) in hypotheses.values()])}


def _rouge_l(references: References, hypotheses: Hypotheses) -> dict[str, float]:
    return {"ROUGE_L": Rouge().compute_score(references, hypotheses)[0]}


def _cider(references: References, hypotheses: Hypotheses) -> dict[str, float]:
    return {"CIDEr": Cider().compute_score(references, hypotheses)[0]}


def _spice(references: References, hypotheses: Hypotheses) -> dict[str, float]:
    return {"SPICE": fmean(spice(references, hypotheses))}


SCORERS: dict[str, Callable[[References, Hypotheses], dict[str, float]]] = {
    "Bleu": _bleu,
    "METEOR": _meteor,
    "ROUGE_L": _rouge_l,
    "CIDEr": _cider,
    "SPICE": _spice,
}
STANDARD = ("Bleu", "METEOR", "ROUGE_L", "CIDEr")  # those that need nothing but this package's dependencies


def caption_scores(
    references: Mapping[Id, Sequence[str]],
    predictions: Mapping[Id, str],
    metrics: Sequence[str] = STANDARD,
    tokenize: Callable[[Sequence[str]], list[str]] = ptb_tokenize,
) -> dict[str, float]:
    """Corpus scores in the order Bleu_1, Bleu_2, Bleu_3, Bleu_4, METEOR, ROUGE_L, CIDEr.

    ``references`` holds one or more captions for each image id and ``predictions`` exactly one, for the same ids.
    ``metrics`` chooses among "Bleu" (all four), "METEOR", "ROUGE_L", "CIDEr" and "SPICE". ``tokenize`` turns texts into
    tokens joined by blanks; only the default one gives comparable scores. They lie in [0, 1], those of CIDEr in [0,
    10].

    CIDEr weighs words by the number of images whose references use them, so it depends on the set that is scored
    together, and that of a single image is 0.0 by definition: log(1) is the weight of each word.

    Raises ValueError for an unknown metric and for ids or captions that are missing or left over, and SpiceError when
    SPICE is asked for and cannot run.
    """
    check_metrics(metrics)
    if "SPICE" in metrics:
        spice_jars()  # what is missing is said before anything is computed
    if "METEOR" in metrics:
        warm_up()
    return score_tokens(tokenize_captions(references, predictions, tokenize), metrics)


def tokenize_captions(
    references: Mapping[Id, Sequence[str]],
    predictions: Mapping[Id, str],
    tokenize: Callable[[Sequence[str]], list[str]] = ptb_tokenize,
) -> Tokens:
    """Tokens of all captions, in one run of the tokenizer. Raises ValueError as `caption_scores` does."""
    _check_captions(references, predictions)
    texts = [*chain.from_iterable(references.values()), *(predictions[key] for key in references)]
    tokens = tokenize(texts)
    if len(tokens) != len(texts):
        raise ValueError(f"tokenize must return a string for each of the {len(texts)} captions, got {len(tokens)}")
    rest = iter(tokens)
    split_references = {key: list(islice(rest, len(group))) for key, group in references.items()}
    if not any(chain.from_iterable(split_references.values())):
        raise ValueError("no reference holds a word")
    return Tokens(split_references, {key: [text] for key, text in zip(references, rest, strict=True)})


def score_tokens(tokens: Tokens, metrics: Sequence[str] = STANDARD) -> dict[str, float]:
    """The scores of `caption_scores` for captions that are tokenised already."""
    chosen = [scorer for name, scorer in SCORERS.items() if name in metrics]
    return {name: float(score) for scorer in chosen for name, score in scorer(*tokens).items()}


def check_metrics(metrics: Sequence[str]) -> None:
    """Raises ValueError for a metric that is unknown, with the nearest known one."""
    folded = {name.lower(): name for name in SCORERS}
    for unknown in [name for name in metrics if name not in SCORERS]:
        close = get_close_matches(unknown.lower(), folded, n=1)
        hint = f"; did you mean {folded[close[0]]!r}?" if close else ""
        raise ValueError(f"unknown caption metric {unknown!r}, known are {', '.join(SCORERS)}{hint}")


def _check_captions(references: Mapping[Id, Sequence[str]], predictions: Mapping[Id, str]) -> None:
    missing = [key for key in references if key not in predictions]
    unexpected = [key for key in predictions if key not in references]
    if missing or unexpected or not references:
        raise ValueError(
            "predictions and references must be of the same one or more images: "
            f"{len(missing)} images have no prediction {missing[:5]}, "
            f"{len(unexpected)} predictions have no references {unexpected[:5]}"
        )
    for key, captions in references.items():
        if isinstance(captions, str) or not captions:
            raise ValueError(f"image {key!r} needs a list of one or more references, got {captions!r}")
        if not isinstance(predictions[key], str):
            raise ValueError(f"image {key!r} needs exactly one string as its prediction, got {predictions[key]!r}")
