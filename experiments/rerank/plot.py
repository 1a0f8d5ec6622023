"""Draws weights.csv: CIDEr against the weight, a panel for each data set and model.

python experiments/rerank/plot.py
"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent


def main() -> None:
    rows = list(csv.DictReader((FOLDER / "weights.csv").open(newline="")))
    panels = sorted({(row["data"], row["model"]) for row in rows})
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        for strategy in ("beam", "sample"):
            line = [row for row in rows if (row["data"], row["model"]) == panel and row["strategy"] == strategy]
            if not line:
                continue
            label = f"{strategy}, {line[0]['candidates']} candidates"
            axis.plot([float(r["weight"]) for r in line], [float(r["CIDEr"]) for r in line], marker=".", label=label)
        axis.set(title="{}, {}".format(*panel), xlabel="rerank_weight", ylabel="CIDEr")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(FOLDER / "weights.png", dpi=110)


if __name__ == "__main__":
    main()
