"""Tables and figure of choosing data."""

from pathlib import Path
from statistics import fmean

from coca_lit.tools.report.tables import Table, markdown
from experiments.study import (
    Row,
    as_they_are,
    by_variant,
    draw_lines,
    mean_std,
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
LEFT_OUT = ("mismatches before", "mismatches after", "mismatches found", "copies left")


def tables() -> dict[str, str]:
    """What training on each choice gives, what each choice leaves out, and what choosing costs."""
    found = {}
    if rows := read_rows(RESULTS):
        found["curation"] = by_variant(renamed(rows, NAMES), SCORES)
    if chosen := read_rows(RESULTS.with_name("choices.csv")):
        found["curation/choices"] = _left_out(chosen)
    if measured := read_rows(RESULTS.with_name("rows.csv")):
        found["curation/rows"] = as_they_are(measured)
    return found


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


def _left_out(rows: list[Row]) -> str:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(NAMES[f"noise{float(row['noise']) * 100:.0f}_{row['choice']}"], []).append(row)
    lines = [
        [name, str(len(group)), mean_std([float(row["kept"]) for row in group])]
        + [mean_std([100 * float(row[column]) for row in group]) for column in LEFT_OUT]
        for name, group in sorted(groups.items(), key=lambda item: [*NAMES.values()].index(item[0]))
    ]
    header = ["choice", "n", "samples", *(f"{column}, %" for column in LEFT_OUT)]
    return markdown(Table("", header, lines))
