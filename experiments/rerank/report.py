"""python experiments/rerank/report.py"""

from pathlib import Path

from experiments.study import about, markdown, read_rows, report

RESULTS = Path(__file__).with_name("results.csv")
SHOWN = ("0.0", "0.1", "0.2", "0.5", "1.0")  # of the weights
SCORES = {"CIDEr": "CIDEr", "Bleu_4": "BLEU-4", "exact_match": "exact match"}


def tables() -> dict[str, str]:
    """A table per data set: a line for each strategy and weight."""
    found = {}
    for data in dict.fromkeys(row["data"] for row in read_rows(RESULTS)):
        rows = [row for row in read_rows(RESULTS) if row["data"] == data]
        lines = [["model", "candidates", "weight", *SCORES.values()]]
        for row in rows:
            if row["weight"] in SHOWN:
                candidates = f"{row['candidates']} {'beams' if row['strategy'] == 'beam' else 'draws'}"
                lines.append([row["model"], candidates, row["weight"], *(row[score] for score in SCORES)])
        found[f"rerank/{data}"] = f"{markdown(lines)}\n\n{about(rows, 'experiments/rerank/run.sh')}"
    return found


def draw() -> None:
    """CIDEr against the weight, a panel for each data set and model."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows = read_rows(RESULTS)
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
    figure.savefig(RESULTS.with_name("weights.png"), dpi=110)


if __name__ == "__main__":
    report(RESULTS, tables, draw)
