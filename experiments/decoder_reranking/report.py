"""Table and figure of decoder re-ranking."""

from pathlib import Path

from experiments.study import draw_lines, mean_std, numbers, read_rows, with_about

RESULTS = Path(__file__).with_name("results.csv")
SHOWN = ("0.0", "0.2", "0.3", "0.4", "0.5", "0.6", "0.8", "1.0")  # of the weights
SCORES = {
    f"{way}_recall@{k}": f"{title} R@{k}, %"
    for way, title in (("t2i", "text to image"), ("i2t", "image to text"))
    for k in (1, 5, 10)
}


def tables() -> dict[str, str]:
    rows = read_rows(RESULTS)
    shown = [row for row in rows if row["weight"] in SHOWN]
    lines = [[row["data"], row["weight"], *(mean_std(numbers([row], s)) for s in SCORES)] for row in shown]
    command = "experiments/decoder_reranking/run.sh"
    return {"decoder_reranking": with_about(["data", "weight", *SCORES.values()], lines, rows, command)} if rows else {}


def draw() -> None:
    """Recall@1 against the weight, a panel for each data set."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in read_rows(RESULTS):
        lines = panels.setdefault(row["data"], {})
        for score, title in SCORES.items():
            if score.endswith("@1"):
                lines.setdefault(title, []).append((float(row["weight"]), *numbers([row], score)))
    draw_lines(panels, "weight of the decoder", "recall@1, %", RESULTS.with_name("decoder_reranking.png"))
