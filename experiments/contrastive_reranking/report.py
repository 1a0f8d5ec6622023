"""Tables and figure of contrastive re-ranking."""

from pathlib import Path

from experiments.study import draw_lines, mean_std, numbers, read_rows, with_about

RESULTS = Path(__file__).with_name("results.csv")
SHOWN = ("0.0", "0.1", "0.2", "0.5", "1.0")  # of the weights
SCORES = {"CIDEr": "CIDEr", "Bleu_4": "BLEU-4", "exact_match": "exact match, %"}


def tables() -> dict[str, str]:
    """A table per data set: a line for each model, kind of candidates and score, a column for each weight."""
    found = {}
    for data in dict.fromkeys(row["data"] for row in read_rows(RESULTS)):
        rows = [row for row in read_rows(RESULTS) if row["data"] == data]
        lines: dict[tuple[str, str, str], list[str]] = {}
        for score, title in SCORES.items():
            for row in rows:
                if row["weight"] in SHOWN and any(numbers(rows, score)):
                    candidates = f"{row['candidates']} {'beams' if row['strategy'] == 'beam' else 'draws'}"
                    lines.setdefault((title, row["model"], candidates), []).append(mean_std(numbers([row], score)))
        header = ["score", "model", "candidates", *(f"weight {weight}" for weight in SHOWN)]
        name = f"contrastive_reranking/{data}"
        cells = [[*names, *values] for names, values in lines.items()]
        found[name] = with_about(header, cells, rows, "experiments/contrastive_reranking/run.sh")
    return found


def draw() -> None:
    """CIDEr against the weight, a panel for each data set and model."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in sorted(read_rows(RESULTS), key=lambda row: (row["data"], row["model"], row["strategy"])):
        line = f"{row['strategy']}, {row['candidates']} candidates"
        points = panels.setdefault(f"{row['data']}, {row['model']}", {}).setdefault(line, [])
        points.append((float(row["weight"]), *numbers([row], "CIDEr")))
    draw_lines(panels, "rerank_weight", "CIDEr", RESULTS.with_name("weights.png"))
