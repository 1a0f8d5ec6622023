"""The scores of a run: which ones lead, which direction is better, and how they are printed."""

import math
from collections.abc import Collection, Mapping

from coca_lit.metrics import lower_is_better

HEADLINES = ("/CIDEr", "_recall@1", "/exact_match", "/top1", "/accuracy")  # in this order
FACTS = ("object", "attribute", "relation")  # in captions of the built-in scenes
NAMES = {
    "Bleu_1": "BLEU-1",
    "Bleu_2": "BLEU-2",
    "Bleu_3": "BLEU-3",
    "Bleu_4": "BLEU-4",
    "ROUGE_L": "ROUGE-L",
    "SPICE_object": "SPICE of objects",
    "SPICE_attribute": "SPICE of attributes",
    "SPICE_relation": "SPICE of relations",
    "SPICE_color": "SPICE of colours",
    "SPICE_count": "SPICE of counts",
    "SPICE_size": "SPICE of sizes",
    "exact_match": "exact matches, %",
    "mean_length": "words per caption",
    "vocabulary": "different words",
    "distinct_1": "distinct-1, %",
    "distinct_2": "distinct-2, %",
    "novel": "novel captions, %",
    "accuracy": "accuracy, %",
    "macro_accuracy": "mean accuracy over kinds, %",
    "CHAIRi": "CHAIRi, objects that are not there, %",
    "CHAIRs": "CHAIRs, captions with such objects, %",
    **{f"{fact}_{kind}": f"{kind} of {fact}s, %" for fact in FACTS for kind in ("precision", "recall")},
    "cut_captions": "captions that are cut, %",
    "read_tokens": "tokens that are read, %",
    "text_score": "text score, %",
    "image_score": "image score, %",
    "group_score": "group score, %",
    "top1": "top-1, %",
    "top5": "top-5, %",
    "mean_per_class_recall": "mean per-class recall, %",
}
DATA_SETS = {  # names of evaluations -> names for readers; others are shown as they are
    "scenes": "built-in scenes",
    "compositional": "built-in scenes, unseen combinations",
    "scenes_vqa": "questions about built-in scenes",
    "mscoco": "MSCOCO",
    "nocaps": "NoCaps",
    "flickr8k": "Flickr8k",
    "flickr30k": "Flickr30k",
    "imagenet": "ImageNet",
    "vqa": "VQA v2",
    "laion": "LAION",
}
DIRECTIONS = {"t2i_": "text to image", "i2t_": "image to text"}
RERANKED = "reranked_"  # prefix of retrieval scores after decoder re-ranking
STATISTICS = ("mean_length", "vocabulary", "distinct_1", "distinct_2", "novel")  # neither good nor bad
COUNTS = ("mean_length", "vocabulary", "median_rank")
# Papers print these times 100, and recall@K and accuracies too.
TIMES_100 = {"CIDEr", "METEOR", "SPICE", "CLIPScore", "RefCLIPScore", *NAMES} - {*COUNTS}


def headlines(scores: Collection[str]) -> list[str]:
    """The headline scores among `scores`, the most important kind first."""
    return [score for kind in HEADLINES for score in scores if score.endswith(kind)]


def headline(scores: Collection[str]) -> str | None:
    """The score that ranks runs if none was named: the first headline score."""
    return next(iter(headlines(scores)), None)


def headlines_of(scores: Collection[str], count: int) -> list[str]:
    """The `count` scores on whole data sets that say most: one of each kind before the second of any, as often as the
    count allows; no re-ranked ones, which are for a section of their own.
    """
    chosen = [score for score in headlines(scores) if score.count("/") == 1 and f"/{RERANKED}" not in score]
    kinds: dict[str, list[str]] = {}
    for score in chosen:
        kinds.setdefault(score.rpartition("/")[2], []).append(score)
    turns = [(place, score) for members in kinds.values() for place, score in enumerate(members)]
    first = {score for _, score in sorted(turns, key=lambda turn: turn[0])[:count]}
    return [score for score in chosen if score in first]


def data_name(name: str) -> str:
    """A data set for readers: "mscoco" -> "MSCOCO", "nocaps/in-domain" -> "NoCaps, in-domain"."""
    name, _, domain = name.partition("/")
    return DATA_SETS.get(name, name) + (f", {domain}" if domain else "")


def best_run(results: Mapping[str, Mapping[str, float]], score: str) -> str | None:
    """The run with the best `score`; None if no run has it.

    Args:
        results: run -> score -> value.
    """
    values = {run: scores[score] for run, scores in results.items() if score in scores}
    values = {run: value for run, value in values.items() if not math.isnan(value)}
    return (min if lower_is_better(score) else max)(values, key=lambda run: values[run], default=None)


def score_name(score: str) -> str:
    """A score for readers: "mscoco/t2i_recall@1" -> "text to image recall@1, %"."""
    short = score.rpartition("/")[2]
    plain = short.removeprefix(RERANKED)
    for prefix, direction in DIRECTIONS.items():
        if plain.startswith(prefix):
            rest = plain.removeprefix(prefix)
            name = f"{direction} {rest.replace('_', ' ')}" + (" after re-ranking" if plain != short else "")
            return f"{name}, %" if rest.startswith("recall") else name
    if short not in NAMES and short.endswith("_accuracy"):
        return f"accuracy on {short.removesuffix('_accuracy').replace('_', ' ')}, %"
    return NAMES.get(short, short)


def in_print_units(score: str, value: float) -> float:
    """The value in the unit that `cell` prints: the scores of papers times 100, counts and scores of one's own as they
    are.
    """
    short = score.rpartition("/")[2]
    return 100 * value if short in TIMES_100 or "recall@" in short or short.endswith("accuracy") else value


def cell(score: str, value: float | None) -> str:
    """The value as papers print it, with one or two decimals; nothing for None."""
    if value is None:
        return ""
    return f"{in_print_units(score, value):.{_decimals(score)}f}"


def interval_cell(score: str, interval: tuple[float, float]) -> str:
    """The limits as `cell` prints values; nothing if there are none."""
    return "" if math.isnan(interval[0]) else f"[{cell(score, interval[0])}, {cell(score, interval[1])}]"


def spread_cell(score: str, mean: float, deviation: float) -> str:
    """A mean over several runs and its standard deviation."""
    return f"{cell(score, mean)} ± {cell(score, deviation)}"


def _decimals(score: str) -> int:
    return 0 if score.endswith("vocabulary") else 1 if score.endswith(COUNTS) else 2
