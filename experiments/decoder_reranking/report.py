"""Tables and figure of decoder re-ranking: by number of candidates, by weight, and choices between two texts.

Rows that differ in the seed of the model alone are one line.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiments.study import Row, mean_std, numbers, read_rows, unit, with_about

RESULTS = Path(__file__).with_name("results.csv")
DEFAULT = "0.5"  # weight in coca-evaluate
COUNTS = {"scenes": "16", "compositional": "16", "flickr8k": "8"}  # candidates where weights are compared
RECALLS = {f"{way}_recall@{k}": f"{arrow} R@{k}" for k in (1, 5) for way, arrow in (("t2i", "t→i"), ("i2t", "i→t"))}
ACCURACIES = {"accuracy": "all"} | {f"{kind}_accuracy": kind for kind in ("order", "colour", "shape")}


def tables() -> dict[str, str]:
    found = {}
    for name, keys, rows, costs, scores in (
        ("", ("data", "count"), _read(), {"pairs": "pairs read", "times": "CPU time"}, RECALLS),
        ("/views", ("data", "count"), _of("views"), {"times": "CPU time"}, RECALLS),
        ("/weights", ("data", "weight"), _compared(), {}, RECALLS),
        ("/choices", ("data", "way", "weight"), _of("likelihood", "pmi"), {}, ACCURACIES),
    ):
        if rows:
            lines = [
                [*key, str(len(of)), *(f"{_mean(of, cost):,.4g}" for cost in costs)]
                + [mean_std(numbers(of, score)) for score in scores]
                for key, of in _grouped(rows, keys).items()
            ]
            header = [*keys, "n", *costs.values(), *(unit(score, title) for score, title in scores.items())]
            found[f"decoder_reranking{name}"] = with_about(header, lines, rows, "experiments/decoder_reranking/run.sh")
    return found


def _of(*ways: str) -> list[Row]:
    return [row for row in read_rows(RESULTS) if row["way"] in ways]


def _compared() -> list[Row]:
    """Rows that differ in the weight, with the same number of candidates."""
    return [row for row in _of("decoder") if row["count"] == COUNTS[row["data"]]]


def _read() -> list[Row]:
    """Rows that differ in the number of candidates, with the same weight; none are the embeddings alone."""
    alone = [row | {"count": "0", "pairs": "0", "times": "1"} for row in _compared() if row["weight"] == "0.0"]
    rows = [*alone, *(row for row in _of("decoder") if row["weight"] == DEFAULT)]
    timed = {row["data"] for row in rows if row["count"] != "0" and row["times"]}
    return sorted(
        (row for row in rows if row["data"] in timed), key=lambda row: ([*COUNTS].index(row["data"]), int(row["count"]))
    )


def _grouped(rows: Sequence[Row], keys: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def _mean(rows: Sequence[Row], column: str) -> float:
    return fmean(float(row[column]) for row in rows)


def draw() -> None:
    """Recall@1 against the CPU time and against the weight; accuracy of choices against the weight."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, ((left, right), (below, choices)) = plt.subplots(2, 2, figsize=(9, 6.6), layout="constrained")
    for axis, data in ((left, "scenes"), (right, "compositional")):
        for label, rows in (("decoder re-ranking", _read()), ("views averaged", [*_alone(), *_of("views")])):
            _line(axis, [row for row in rows if row["data"] == data], "times", tuple(RECALLS)[:2], label)
        axis.set_xscale("log")
        axis.set(title=f"{data}: candidates or views", xlabel="times the CPU time of retrieval", ylabel="recall@1, %")
    for data in COUNTS:
        rows = [row for row in _compared() if row["data"] == data]
        _line(below, rows, "weight", tuple(RECALLS)[:2], f"{data}, {COUNTS[data]} candidates")
    below.set(title="recall by weight", xlabel="weight of the decoder", ylabel="recall@1, %")
    for (data, way), rows in _grouped(_of("likelihood", "pmi"), ("data", "way")).items():
        _line(choices, rows, "weight", ("accuracy",), f"{data}, {way}")
    choices.set(title="choice between two texts", xlabel="weight of the decoder", ylabel="right, %")
    for axis in (left, right, below, choices):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(RESULTS.with_name("decoder_reranking.png"), dpi=110)
    plt.close(figure)


def _alone() -> list[Row]:
    return [row for row in _read() if row["count"] == "0"]


def _line(axis: Any, rows: Sequence[Row], x: str, scores: Sequence[str], label: str) -> None:
    """The mean of the scores against x, with the standard deviation over seeds."""
    places, values, bars = [], [], []
    for of in _grouped(rows, ("count", "weight") if x == "times" else (x,)).values():
        means = [fmean(own) for own in zip(*(numbers(of, score) for score in scores), strict=True)]
        places.append(_mean(of, x))
        values.append(fmean(means))
        bars.append(stdev(means) if len(means) > 1 else 0)
    if places:
        axis.errorbar(places, values, bars, marker=".", capsize=2, label=label)
