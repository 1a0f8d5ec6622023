"""Table: what the scaling law expected of the runs that were held out."""

from pathlib import Path

from experiments.study import numbers, read_rows, with_about

RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = ("value", "expected", "low", "high")


def tables() -> dict[str, str]:
    """From scaling.csv, which `coca-report --scaling` writes; the runs and where they ran are in results.csv."""
    law, runs = read_rows(RESULTS.with_name("scaling.csv")), read_rows(RESULTS)
    if not (law and runs):
        return {}
    header = ["run", "GFLOP", "expected", "95 % interval", "measured", "inside"]
    lines = []
    for row in (row for row in law if row["expected"]):
        value, expected, low, high = (numbers([row | {row["score"]: row[k]}], row["score"])[0] for k in COLUMNS)
        inside = "yes" if low <= value <= high else "no"
        interval = f"[{low:.1f}, {high:.1f}]"
        name = f"{row['family']} {row['run']}".strip()
        lines.append([name, f"{float(row['GFLOP']):.3g}", f"{expected:.1f}", interval, f"{value:.1f}", inside])
    return {"scaling": with_about(header, lines, runs)}
