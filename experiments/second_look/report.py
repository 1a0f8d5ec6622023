"""python experiments/second_look/report.py"""

from pathlib import Path

from experiments.study import about, markdown, read_rows, report

RESULTS = Path(__file__).with_name("results.csv")
SHOWN = ("0.0", "0.2", "0.3", "0.4", "0.5", "0.6", "0.8", "1.0")  # of the weights
SCORES = {
    f"{way}_recall@{k}": f"{title} R@{k}"
    for way, title in (("t2i", "text to image"), ("i2t", "image to text"))
    for k in (1, 5, 10)
}


def tables() -> dict[str, str]:
    rows = read_rows(RESULTS)
    columns = {"data": "data", "weight": "weight", **SCORES}
    lines = [list(columns.values()), *([row[key] for key in columns] for row in rows if row["weight"] in SHOWN)]
    return {"second_look": f"{markdown(lines)}\n\n{about(rows, 'experiments/second_look/run.sh')}"} if rows else {}


def draw() -> None:
    """Recall@1 against the weight, a panel for each data set."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows = read_rows(RESULTS)
    sets = list(dict.fromkeys(row["data"] for row in rows))
    figure, axes = plt.subplots(1, len(sets), figsize=(3.4 * len(sets), 3), squeeze=False, layout="constrained")
    for axis, data in zip(axes[0], sets, strict=True):
        line = [row for row in rows if row["data"] == data]
        for score, title in SCORES.items():
            if score.endswith("@1"):
                axis.plot([float(r["weight"]) for r in line], [float(r[score]) for r in line], marker=".", label=title)
        axis.set(title=data, xlabel="weight of the decoder", ylabel="recall@1")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(RESULTS.with_name("second_look.png"), dpi=110)


if __name__ == "__main__":
    report(RESULTS, tables, draw)
