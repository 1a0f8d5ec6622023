"""Writes the tables of the benchmarks' README, and of the project's, from their CSVs: the newest row of every case.

python experiments/benchmarks/report.py
"""

import csv
import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
READMES = (FOLDER / "README.md", FOLDER.parents[1] / "README.md")
CASES = ("case", "what", "model", "strategy", "batch", "precision", "engine")  # columns that say what was measured
ABOUT = ("date", "command", "commit", "machine", "OMP_NUM_THREADS", "versions")


def table(path: Path) -> str:
    """Markdown of a CSV that `record` wrote."""
    newest: dict[tuple[str, ...], dict[str, str]] = {}
    for row in csv.DictReader(path.open(newline="")):
        case = tuple(row.get(column) or "" for column in CASES)
        newest.pop(case, None)
        newest[case] = row
    rows = list(newest.values())
    columns = [c for c in rows[0] if c not in ABOUT and any(row.get(c) for row in rows)]
    lines = [_line(columns), _line(["---"] * len(columns))]
    lines += [_line([row.get(column) or "" for column in columns]) for row in rows]
    last = rows[-1]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    about = f"`{last['command'].split(' --')[0]}` at commit {commits}, {last['machine']}, {last['versions']}."
    return "\n".join([*lines, "", about])


def write_tables(readme: Path) -> str:
    """The text of a README with the tables `<!-- table:benchmarks/NAME -->` as the CSVs have them now."""

    def block(match: re.Match[str]) -> str:
        path = FOLDER / f"{match[2]}.csv"
        return f"{match[1]}{table(path) if path.exists() else 'Not recorded yet.'}\n{match[3]}"

    return re.sub(
        r"(<!-- table:benchmarks/(\w+) -->\n).*?(<!-- /table -->)", block, readme.read_text(), flags=re.DOTALL
    )


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for path in READMES:
        path.write_text(write_tables(path))
