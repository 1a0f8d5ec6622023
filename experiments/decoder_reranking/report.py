"""Tables and figure of decoder re-ranking: by number of candidates, by weight, and choices between two texts.

Rows that differ in the seed of the model alone are one line.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiments.study import DATA, Row, mean_std, numbers, read_rows, unit, with_about

RESULTS = Path(__file__).with_name("results.csv")
DEFAULT = "0.5"  # weight in coca-evaluate
SHOWN = ("0.0", "0.2", "0.7", "1.0")  # of the weights, in tables of recall; the CSV has all
CHOSEN = ("0.0", "0.2", "1.0")  # and in that of choices
COUNTS = {"scenes": ("0", "2"), "compositional": ("0", "2"), "flickr8k": ("0", "2", "16")}  # of the candidates
COUNT = "16"  # candidates where weights are compared
RECALLS = {"t2i_recall@1": "t→i R@1", "i2t_recall@1": "i→t R@1"}
ACCURACIES = {"accuracy": "all"} | {f"{kind}_accuracy": kind for kind in ("order", "colour", "shape")}

COSTS = {"times": ("CPU time", ".1f")}  # column: title, format


def tables() -> dict[str, str]:
    found = {}
    for name, keys, rows, costs, scores in (
        ("", {"count": "candidates"}, [row for row in _read() if row["count"] in COUNTS[row["data"]]], COSTS, RECALLS),
        ("/weights", {"weight": "weight"}, _shown(_compared(), "flickr8k", SHOWN), {}, RECALLS),
        ("/choices", {"weight": "weight"}, _shown(_of("likelihood"), "compositional", CHOSEN), {}, ACCURACIES),
    ):
        if rows:
            lines = [
                [DATA[data], *key, str(len(of)), *(f"{_mean(of, cost):{form}}" for cost, (_, form) in costs.items())]
                + [mean_std(numbers(of, score)) for score in scores]
                for (data, *key), of in _grouped(rows, ("data", *keys)).items()
            ]
            header = [
                "data",
                *keys.values(),
                "n",
                *(title for title, _ in costs.values()),
                *(unit(score, title) for score, title in scores.items()),
            ]
            found[f"decoder_reranking{name}"] = with_about(header, lines, rows)
    return found


def _shown(rows: Sequence[Row], data: str, weights: Sequence[str]) -> list[Row]:
    return [row for row in rows if row["weight"] in weights and row["data"] == data]


def _choices() -> list[Row]:
    return _of("likelihood", "pmi")


def _of(*ways: str) -> list[Row]:
    return [row for row in read_rows(RESULTS) if row["way"] in ways]


def _compared() -> list[Row]:
    """Rows that differ in the weight, with the same number of candidates."""
    return [row for row in _of("decoder") if row["count"] == COUNT]


def _read() -> list[Row]:
    """Rows that differ in the number of candidates, with the same weight; none are the embeddings alone."""
    alone = [row | {"count": "0", "pairs": "0", "times": "1"} for row in _compared() if row["weight"] == "0.0"]
    rows = [*alone, *(row for row in _of("decoder") if row["weight"] == DEFAULT)]
    return sorted(rows, key=lambda row: ([*DATA].index(row["data"]), int(row["count"])))


def _grouped(rows: Sequence[Row], keys: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def _mean(rows: Sequence[Row], column: str) -> float:
    return fmean(float(row[column]) for row in rows)


def draw() -> None:
    """Recall@1 against the CPU time, what each weight adds to it, and right choices by weight."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, places = plt.subplot_mosaic("aabbcc;dddeee", figsize=(11, 6.6), layout="constrained")
    *above, weights, choices = places.values()
    for axis, data in zip(above, DATA, strict=True):
        alone = [row for row in _read() if row["count"] == "0"]
        for label, rows in (
            ("decoder re-ranking, 2 candidates and more", _read()),
            ("2 views and more, averaged", [*alone, *_of("views")]),
        ):
            _line(axis, [row for row in rows if row["data"] == data], "times", _recall_at_1, label)
        axis.set_xscale("log")
        axis.set_xticks(ticks := [1, 2, 5, 10, 20, 50], [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set(title=DATA[data], xlabel="CPU time, embeddings alone = 1", ylabel="recall@1, %")
    for data in DATA:
        rows = [row for row in _compared() if row["data"] == data]
        start = {row["model"]: _recall_at_1(row) for row in rows if row["weight"] == "0.0"}
        _line(weights, rows, "weight", partial(_gained, start), DATA[data])
    weights.set(
        title=f"what the decoder adds, {COUNT} candidates",
        xlabel="weight of the decoder",
        ylabel="recall@1, points gained",
    )
    for (data, way), rows in _grouped(_choices(), ("data", "way")).items():
        _line(choices, rows, "weight", lambda row: 100 * float(row["accuracy"]), f"{DATA[data]}, {way}")
    choices.set(title="choice between two texts", xlabel="weight of the decoder", ylabel="right, %")
    for axis in places.values():
        low, high = axis.get_ylim()
        axis.set_ylim(low - 0.3 * (high - low), high)  # room for the legend
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    figure.savefig(RESULTS.with_name("decoder_reranking.png"), dpi=110)
    plt.close(figure)


def _recall_at_1(row: Row) -> float:
    """Mean over both directions, in %."""
    return 50 * (float(row["t2i_recall@1"]) + float(row["i2t_recall@1"]))


def _gained(start: Mapping[str, float], row: Row) -> float:
    """By how many points recall@1 exceeds that of the embeddings alone, with the same model."""
    return _recall_at_1(row) - start[row["model"]]


def _line(axis: Any, rows: Sequence[Row], x: str, y: Callable[[Row], float], label: str) -> None:
    """The mean of y against x, with the standard deviation over seeds, where all seeds were scored."""
    found = _grouped(rows, ("count", "weight")).values()
    groups = [of for of in found if len(of) == max(map(len, found))]
    values = [[y(row) for row in of] for of in groups]
    bars = [stdev(of) if len(of) > 1 else 0 for of in values]
    axis.errorbar(
        [_mean(of, x) for of in groups], [fmean(of) for of in values], bars, marker=".", capsize=2, label=label
    )
