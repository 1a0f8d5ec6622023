"""The scores of a run: which ones lead, which direction is better, how they are named and printed."""

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from coca_lit import extensions
from coca_lit.reading import printable

if TYPE_CHECKING:  # else every command would wait for NumPy
    from coca_lit.metrics.uncertainty import Draws

HEADLINES = ("/CIDEr", "_recall@1", "/exact_match", "/top1", "/accuracy")  # in this order
OWN_SCORES = 6  # shown where there is no headline score
FACTS = ("object", "attribute", "relation")  # in captions of the built-in scenes
NAMES = {
    **{f"Bleu_{n}": f"BLEU-{n}" for n in range(1, 5)},
    "ROUGE_L": "ROUGE-L",
    **{f"SPICE_{kind}": f"SPICE of {kind}s" for kind in (*FACTS, "count", "size")},
    "SPICE_color": "SPICE of colours",
    "CIDEr_plain": "CIDEr without clipping and length penalty",
    "likelihood_per_token": "likelihood per token",
    "pmi": "gain in likelihood (PMI)",
    "pmi_per_token": "gain in likelihood per token",
    "people": "people with each other",
    "exact_match": "exact matches, %",
    "mean_length": "words per caption",
    "vocabulary": "different words",
    "distinct_1": "different words of all (distinct-1), %",
    "distinct_2": "different word pairs of all (distinct-2), %",
    "novel": "novel captions, %",
    "accuracy": "accuracy, %",
    "macro_accuracy": "mean accuracy over kinds, %",
    **{f"{fact}_{kind}": f"{kind} of {fact}s, %" for fact in FACTS for kind in ("precision", "recall")},
    "cut_captions": "captions that are cut, %",
    "read_tokens": "tokens that are read, %",
    "top1": "top-1, %",
    "top5": "top-5, %",
    "mean_per_class_recall": "mean per-class recall, %",
    "p": "p of the paired test",
}
DATA_SETS = {  # names of evaluations -> names for readers, besides those that projects declare
    "scenes": "built-in scenes",
    "compositional": "built-in scenes, unseen combinations",
    "mscoco": "MSCOCO",
    "nocaps": "NoCaps",
    "flickr8k": "Flickr8k",
    "flickr30k": "Flickr30k",
    "imagenet": "ImageNet",
    "imagenet_v2": "ImageNet-V2",
    "imagenet_a": "ImageNet-A",
    "imagenet_r": "ImageNet-R",
    "imagenet_sketch": "ImageNet-Sketch",
    "folder": "your photos",
    "my_photos": "your photos",
    "laion": "LAION",
}
WAYS = {  # second parts of the names of scores: how an answer was found -> for readers, besides those of projects
    "likelihood": "by likelihood",
    "pmi": "by the gain in likelihood",
    "half": "half of the images",
    "folds": "mean of folds",
}
DIRECTIONS = {"t2i_": "text to image", "i2t_": "image to text"}
TAUS = {"tau_b_": "Kendall's tau-b of ", "tau_c_": "Kendall's tau-c of "}  # prefixes of scores of scores
RERANKED = "reranked_"  # prefix of retrieval scores after decoder re-ranking
STATISTICS = ("mean_length", "vocabulary", "distinct_1", "distinct_2", "novel")  # neither good nor bad
COUNTS = ("mean_length", "vocabulary", "median_rank")
# Papers print these times 100, and recall@K and accuracies too.
TIMES_100 = {"CIDEr", "METEOR", "SPICE", "CLIPScore", "RefCLIPScore", *NAMES} - {*COUNTS, "p"}


def headlines(scores: Collection[str]) -> list[str]:
    """The headline scores among `scores`, the most important kind first."""
    return [score for kind in HEADLINES for score in scores if score.endswith(kind)]


def headline(scores: Collection[str]) -> str | None:
    """The score that ranks runs if none was named: the first headline score."""
    return next(iter(headlines(scores)), None)


def own_scores(scores: Collection[str]) -> list[str]:
    """What stands in for headline scores where there are none, as with an evaluation of one's own: the first scores."""
    return [] if headlines_of(scores, 1) else list(scores)[:OWN_SCORES]


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
    name, _, way = name.partition("/")
    title = (DATA_SETS | extensions.declared("titles")).get(name, name)
    return f"{title}, {way_name(way)}" if way else title


def way_name(way: str) -> str:
    """How an answer was found, for readers: "pmi" -> "by the gain in likelihood"; a domain as it is."""
    return (WAYS | extensions.declared("titles")).get(way, way)


def score_name(score: str) -> str:
    """A score for readers: "mscoco/t2i_recall@1" -> "text to image recall@1, %"."""
    short = score.rpartition("/")[2]
    if short in extensions.scores():
        return extensions.scores()[short].title
    for prefix, measure in TAUS.items():
        if short.startswith(prefix):
            return measure + NAMES.get(rest := short.removeprefix(prefix), rest)
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
    return 100 * value if _times_100(score) else value


def _times_100(score: str) -> bool:
    short = score.rpartition("/")[2]
    if short in extensions.scores():
        return extensions.scores()[short].title.endswith("%")
    return short in TIMES_100 or "recall@" in short or short.endswith("accuracy") or short.startswith(tuple(TAUS))


def cell(score: str, value: float | None, images: int | None = None) -> str:
    """The value as papers print it; nothing for None.

    Args:
        images: on which it was computed: of 64, one is 1.6 %, so decimals would mean nothing. None if unknown.
    """
    if value is None:
        return ""
    if score.endswith("vocabulary"):
        decimals = 0
    elif score.endswith(COUNTS):
        decimals = 1
    elif score.endswith("/p"):  # of a test
        decimals = 3
    elif not _times_100(score):  # a score of one's own, whose size nobody knows
        decimals = 4 if abs(value) < 100 else 2
    elif images is None:
        decimals = 2
    else:
        decimals = 0 if images < 100 else 1 if images < 5000 else 2
    return f"{in_print_units(score, value):z.{decimals}f}"  # z: no -0


def interval_cell(score: str, interval: tuple[float, float], images: int | None = None) -> str:
    """The limits as `cell` prints values; nothing if there are none, or none that can be told apart."""
    low, high = (cell(score, limit, images) for limit in interval)
    return "" if math.isnan(interval[0]) or low == high else f"[{low}, {high}]"


def spread_cell(score: str, mean: float, deviation: float, images: int | None = None) -> str:
    """A mean over several runs and its standard deviation."""
    return f"{cell(score, mean, images)} ± {cell(score, deviation, images)}"


def print_scores(
    results: Mapping[str, float],
    draws: "Mapping[str, Draws]",
    images: Mapping[str, int] = MappingProxyType({}),
    judges: Mapping[str, str | None] = MappingProxyType({}),
) -> None:
    """Prints the scores of one data set after the other, in the units of papers, with their intervals.

    Args:
        images: score -> on how many images it was computed.
        judges: score -> the checkpoint that judged; None for the scored model itself.
    """
    if results:
        print("results" + (", with 95 % intervals" if draws else ""))
    groups: dict[str, list[list[str]]] = {}
    for score, value in results.items():
        count = images.get(score)
        interval = interval_cell(score, draws[score].interval(), count) if score in draws else ""
        heading = data_name(score.rpartition("/")[0]) or "all images"
        heading += f", {count:,} images" if count is not None else ""
        name = score_name(score)
        if score in judges:
            name += f" by {judges[score] or 'the model itself'}"
        groups.setdefault(heading, []).append([printable(name), cell(score, value, count), interval])
    for heading, rows in groups.items():
        print(f"\n{printable(heading)}", *aligned(rows, right=[1]), sep="\n  ")


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Lines of columns, as wide as they must be.

    Args:
        right: the columns whose texts end below each other.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        texts = enumerate(zip(row, widths, strict=True))
        cells = [text.rjust(width) if column in right else text.ljust(width) for column, (text, width) in texts]
        lines.append("  ".join(cells).rstrip())
    return lines
