"""Tables and figure of choosing data."""

from pathlib import Path
from statistics import fmean

from experiments.study import (
    by_variant,
    draw_lines,
    numbers,
    read_rows,
    renamed,
    unit,
    variants,
)

RESULTS = Path(__file__).with_name("results.csv")
SHARES = (10, 30, 50)  # % of noise
CHOICES = {
    "all": "all pairs",
    "distinct": "deduplicated",
    "similarity": "deduplicated, by similarity",
    "likelihood": "deduplicated, by likelihood",
    "recaptioned": "by similarity, the rest recaptioned",
    "mixed": "deduplicated, old or new caption",
    "clean": "oracle",
}
NAMES = {f"noise{noise}_{choice}": f"{noise} %: {name}" for noise in SHARES for choice, name in CHOICES.items()}
SCORES = {
    "scenes/CIDEr": "CIDEr",
    "scenes/t2i_recall@1": "text to image R@1",
    "scenes/i2t_recall@1": "image to text R@1",
}
TABLED = {score: title for score, title in SCORES.items() if "i2t" not in score}  # the figure has all
ROWS = [f"noise{noise}_{choice}" for noise in (10, 50) for choice in CHOICES if choice not in ("distinct", "mixed")]


def tables() -> dict[str, str]:
    """What training on each choice gives; other CSVs have what it leaves out, and what choosing costs."""
    rows = read_rows(RESULTS)
    return {"curation": by_variant(renamed(rows, {name: NAMES[name] for name in ROWS}), TABLED)} if rows else {}


def draw() -> None:
    """The mean of each score over the share of noise, a line for each choice."""
    groups = variants(read_rows(RESULTS))

    def points(choice: str, score: str) -> list[tuple[float, float]]:
        of_shares = {noise: groups.get(f"noise{noise}_{choice}", []) for noise in SHARES}
        return [(noise, fmean(numbers(rows, score))) for noise, rows in of_shares.items() if rows]

    panels = {
        unit(score, title): {name: found for choice, name in CHOICES.items() if (found := points(choice, score))}
        for score, title in SCORES.items()
    }
    draw_lines(panels, "noise, %", "", RESULTS.with_name("curation.png"))
