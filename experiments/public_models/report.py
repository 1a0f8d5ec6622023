"""Table of what public models cost on a CPU."""

from pathlib import Path

from coca_lit.tools.report.tables import Table, markdown
from experiments.study import read_rows, readable

RESULTS = Path(__file__).with_name("results.csv")
TABLED = tuple(f"{family}_ViT-{size}" for family in ("coca", "mammut") for size in ("S-32", "B-32", "L-14", "H-14"))
COLUMNS = (
    "model",
    "parameters, M",
    "GFLOP per pair",
    "file, GB",
    "loading, s",
    "captions/s",
    "images/s",
    "texts/s",
    "peak memory, GB",
)


def tables() -> dict[str, str]:
    rows = [row for row in read_rows(RESULTS) if row["model"] in TABLED]  # the CSV has all sizes
    if not rows:
        return {}
    lines = [[readable(row[column]) for column in COLUMNS] for row in rows]
    about = f"`cost.py` at commit {rows[0]['commit']}, {rows[0]['machine']}."
    return {"public_models": f"{markdown(Table('', COLUMNS, lines))}\n\n{about}"}
