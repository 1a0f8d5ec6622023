"""Tables and figure of forgetting: what caption finetuning leaves of retrieval."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiments.study import Row, by_variant, numbers, read_rows, renamed, variants

RESULTS = Path(__file__).with_name("results.csv")
NAMES = {  # the figure has runs between before and weight 0, too
    "before": "before finetuning",
    "c0": "contrastive weight 0",
    "frozen": "weight 0, towers and pooler frozen",
    "lora": "weight 0, LoRA in towers and pooler",
    "c0.3": "weight 0.3",
    "lora_c0.3": "weight 0.3, LoRA in towers and pooler",
}
MARKERS = {"before": "o", "c0": "X", "frozen": "s", "lora": "D", "c0.3": "v", "lora_c0.3": "P"}
# prefix of runs: the captions that are learned, the data whose recall is kept
STARTS = {"": ("narrated", "scenes"), "modern_": ("narrated", "scenes"), "flickr8k_": ("flickr8k", "flickr8k")}
SCORES = {"{}/kept": "R@5 kept, %"} | {
    f"{{}}/{way}_recall@1": f"{arrow} R@1" for way, arrow in (("t2i", "t→i"), ("i2t", "i→t"))
}


def tables() -> dict[str, str]:
    found = {}
    for prefix in ("", "flickr8k_"):  # the modern model is in the figure
        captions, data = STARTS[prefix]
        if rows := runs_of(prefix):
            scores = {f"{captions}/CIDEr": "CIDEr"} | {name.format(data): title for name, title in SCORES.items()}
            found["/".join(filter(None, ("forgetting", prefix.strip("_"))))] = by_variant(renamed(rows, NAMES), scores)
    return found


def runs_of(prefix: str) -> list[Row]:
    """The scored runs of the models with this prefix, without it, with the recall@5 that is left of that of the same
    seed before finetuning, in %.
    """
    _, data = STARTS[prefix]
    others = tuple(other for other in STARTS if other and other != prefix)
    own = [row for row in read_rows(RESULTS) if row["run"].startswith(prefix) and not row["run"].startswith(others)]
    scored = [row | {"run": row["run"].removeprefix(prefix)} for row in own if row.get(f"{data}/t2i_recall@5")]
    before = {row["seed"]: _recall_at_5(row, data) for row in scored if row["run"].startswith("before")}
    return [
        row | {f"{data}/kept": f"{100 * _recall_at_5(row, data) / before[row['seed']]:.2f}"}
        for row in scored
        if row["seed"] in before
    ]


def _recall_at_5(row: Row, data: str) -> float:
    """Mean over both directions."""
    return fmean(float(row[f"{data}/{way}_recall@5"]) for way in ("t2i", "i2t"))


def draw() -> None:
    """The frontier: recall@5 that is kept against CIDEr of the new captions, a panel for each model."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    axes[1].sharex(axes[0])
    axes[1].sharey(axes[0])
    titles = ("scenes", "scenes, CoCa2 with the modern text side", "photos, same style of captions")
    for axis, prefix, title in zip(axes, STARTS, titles, strict=True):
        rows = runs_of(prefix)
        points = {name: _point(of, *STARTS[prefix]) for name, of in variants(rows).items()}
        between = [name for name in points if "wise" in name]
        if between:
            line = [points[name][0] for name in ("before", *between, "c0")]
            label = "between before and weight 0, by share"
            axis.plot(*zip(*line, strict=True), ":", color="grey", zorder=0, label=label)
        for name in between:
            place, (dx, dy) = points[name]
            axis.errorbar(*place, dy, dx, "d", color="grey", capsize=2)
            axis.annotate(name.removeprefix("c0_wise"), place, (6, -12), textcoords="offset points", fontsize=8)
        for name, marker in MARKERS.items():
            if name in points:
                (x, y), (dx, dy) = points[name]
                axis.errorbar(x, y, dy, dx, marker, capsize=2, label=NAMES[name])
        axis.axhline(95, color="black", linewidth=0.8, linestyle="--", label="aim: 95 %")
        axis.set(title=title, xlabel="CIDEr of the new captions")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("recall@5 of the old captions that is kept, %")
    axes[0].legend(fontsize=8, loc="lower left")
    figure.savefig(RESULTS.with_name("forgetting.png"), dpi=110)
    plt.close(figure)


def _point(rows: Sequence[Row], captions: str, data: str) -> tuple[Any, Any]:
    """Mean (CIDEr, share kept) over seeds, and their standard deviations."""
    columns = [numbers(rows, score) for score in (f"{captions}/CIDEr", f"{data}/kept")]
    return tuple(map(fmean, columns)), tuple(stdev(of) if len(of) > 1 else 0 for of in columns)
