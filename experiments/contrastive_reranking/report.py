"""Tables and figure of contrastive re-ranking."""

import statistics
from pathlib import Path

from experiments.study import DATA, Row, draw_lines, mean_std, numbers, read_rows, with_about

RESULTS = Path(__file__).with_name("results.csv")
SHOWN = ("0.0", "0.1", "0.2", "1.0")  # of the weights
SCORES = {"CIDEr": "CIDEr", "exact_match": "exact match, %"}  # the CSV has all
TABLED = ("compositional", "flickr8k")
CANDIDATES = {"beam": "beams", "sample": "draws"}
MODELS = {
    "demo": "demo",
    "demo_short": "demo, 2 epochs",
    "long": "two hours",
    "long_rewards": "two hours, SCST",
}


def groups() -> dict[tuple[str, str, str], list[Row]]:
    """{(data, model, candidates): rows of all seeds and weights}"""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted(read_rows(RESULTS), key=lambda row: list(MODELS).index(row["model"])):
        candidates = f"{row['candidates']} {CANDIDATES[row['strategy']]}"
        found.setdefault((row["data"], MODELS[row["model"]], candidates), []).append(row)
    return found


def tables() -> dict[str, str]:
    """A table per data set: a line for each model and score of the beams, a column for each weight."""
    found, all_groups = {}, groups()
    for data in TABLED:
        lines, all_rows = [], []
        for score, title in SCORES.items():
            for (own, model, candidates), rows in all_groups.items():
                if own == data and candidates.endswith("beams") and any(numbers(rows, score)):
                    n = len({row["seed"] for row in rows})
                    values = [[row for row in rows if row["weight"] == weight] for weight in SHOWN]
                    lines.append([title, model, candidates, str(n), *(mean_std(numbers(v, score)) for v in values)])
                    all_rows += rows
        header = ["score", "model", "candidates", "n", *(f"weight {weight}" for weight in SHOWN)]
        found[f"contrastive_reranking/{data}"] = with_about(header, lines, all_rows)
    return found


def draw() -> None:
    """CIDEr against the weight, means of the seeds, a panel for each data set and model."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (data, model, candidates), rows in groups().items():
        weights = dict.fromkeys(row["weight"] for row in rows)
        means = {w: statistics.mean(numbers([row for row in rows if row["weight"] == w], "CIDEr")) for w in weights}
        panels.setdefault(f"{DATA[data]}, {model}", {})[candidates] = [(float(w), mean) for w, mean in means.items()]
    draw_lines(panels, "rerank_weight", "CIDEr", RESULTS.with_name("weights.png"))
