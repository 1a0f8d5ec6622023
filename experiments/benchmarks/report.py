"""Tables of the benchmarks: the newest row of every case of their CSVs."""

from pathlib import Path

from coca_lit.report.tables import Table, markdown
from experiments.study import Row, read_rows

FOLDER = Path(__file__).resolve().parent
# Columns that name what was measured.
CASES = ("case", "what", "way", "score", "model", "strategy", "batch", "precision", "engine", "workers")
ABOUT = ("date", "command", "commit", "machine", "OMP_NUM_THREADS", "versions")


def tables() -> dict[str, str]:
    return {f"benchmarks/{path.stem}": table(path) for path in sorted(FOLDER.glob("*.csv"))}


def table(path: Path) -> str:
    """Markdown of a CSV that `record` wrote."""
    newest: dict[tuple[str, ...], Row] = {}
    for row in read_rows(path):
        case = tuple(row.get(column) or "" for column in CASES)
        newest.pop(case, None)
        newest[case] = row
    rows = list(newest.values())
    columns = [c for c in rows[0] if c not in ABOUT and any(row.get(c) for row in rows)]
    lines = [[row.get(column) or "" for column in columns] for row in rows]
    last = rows[-1]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    about = f"`{last['command'].split(' --')[0]}` at commit {commits}, {last['machine']}, {last['versions']}."
    return f"{markdown(Table(path.stem, columns, lines))}\n\n{about}"
