"""Tables and figure of forgetting: what caption finetuning leaves of retrieval."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.study import Row, by_variant, numbers, read_rows, renamed, variants

RESULTS = Path(__file__).with_name("results.csv")
NAMES = {
    "before": "before finetuning",
    "c0": "contrastive weight 0",
    "decay": "weight 0, layer-wise decay 0.5",
    "frozen": "weight 0, towers and pooler frozen",
    "lora": "weight 0, LoRA in towers and pooler",
    "c0.1": "weight 0.1",
    "c0.3": "weight 0.3",
    "c1": "weight 1",
    "lora_c0.3": "weight 0.3, LoRA in towers and pooler",
}
PHOTOS = "flickr8k_"
BETWEEN_PHOTOS = {f"c0_wise{share}": f"between before and weight 0, share {share}" for share in (0.25, 0.5, 0.75)}
SCORES = {"narrated/CIDEr": "CIDEr", "scenes/kept": "R@5 kept, %"} | {
    f"scenes/{way}_recall@{k}": f"{arrow} R@{k}" for k in (5, 1) for way, arrow in (("t2i", "t→i"), ("i2t", "i→t"))
}
OF_PHOTOS = {
    name.replace("narrated", "flickr8k").replace("scenes", "flickr8k"): title for name, title in SCORES.items()
}


def recall_at_5(row: Mapping[str, str], data: str = "scenes") -> float:
    """Mean over both directions."""
    return statistics.mean(float(row[f"{data}/{way}_recall@5"]) for way in ("t2i", "i2t"))


def with_kept(rows: Sequence[Row], data: str = "scenes") -> list[Row]:
    """The scored rows, with the share of recall@5 that is left of that of the same seed before finetuning."""
    before = {row["seed"]: recall_at_5(row, data) for row in rows if row["run"].startswith("before")}
    scored = [row for row in rows if row.get(f"{data}/t2i_recall@5")]
    return [
        row | {f"{data}/kept": f"{recall_at_5(row, data) / before[row['seed']]:.4f}"}
        for row in scored
        if row["seed"] in before
    ]


def tables() -> dict[str, str]:
    rows = read_rows(RESULTS)
    scenes = with_kept([row for row in rows if not row["run"].startswith(PHOTOS)])
    photos = [row | {"run": row["run"].removeprefix(PHOTOS)} for row in rows if row["run"].startswith(PHOTOS)]
    named = renamed(scenes, NAMES)
    found = {"forgetting": by_variant(named, SCORES)} if named else {}
    if between := [row for row in scenes if "_wise" in row["run"]]:
        between.sort(key=lambda row: row["run"])
        found["forgetting/between"] = by_variant(
            [row | {"run": row["run"].replace("_wise", ", share ")} for row in between], SCORES
        )
    if photos:
        found["forgetting/flickr8k"] = by_variant(
            renamed(with_kept(photos, "flickr8k"), NAMES | BETWEEN_PHOTOS), OF_PHOTOS
        )
    return found


def draw() -> None:
    """Recall@5 of the old captions against CIDEr of the new ones: means over seeds, and interpolated weights."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows = [row for row in read_rows(RESULTS) if row.get("scenes/t2i_recall@5")]
    places = {
        name: (statistics.mean(numbers(runs, "narrated/CIDEr")), 100 * statistics.mean(map(recall_at_5, runs)))
        for name, runs in variants(rows).items()
        if not name.startswith(PHOTOS)
    }
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for end in ("c0", "c0.3"):
        way = ["before", *(f"{end}_wise{i / 10}" for i in range(1, 10)), end]
        line = [places[name] for name in way if name in places]
        if len(line) > 2:  # interpolated weights were scored
            axes.plot(*zip(*line, strict=True), marker=".", zorder=1, label=f"between before and {NAMES[end]}")
    for (name, title), marker in zip(NAMES.items(), "oXdsv^<>P", strict=True):
        if name in places:
            axes.scatter(*places[name], s=50, marker=marker, zorder=2, label=title)
    axes.set(xlabel="CIDEr of the new style", ylabel="recall@5 of the old style, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(RESULTS.with_name("forgetting.png"), dpi=110)
