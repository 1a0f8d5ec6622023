"""Tables of the benchmarks: the newest row of every case of their CSVs.

Cases that measured different things have a table each, so that no cell is empty for that reason. What is the same in
all rows is below the table.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from coca_lit.report.scores import score_name
from coca_lit.report.tables import Table, markdown
from experiments.study import Row, read_rows

FOLDER = Path(__file__).resolve().parent
# Columns that name what was measured.
CASES = ("case", "what", "way", "score", "model", "strategy", "batch", "precision", "engine", "workers")
ABOUT = ("date", "command", "commit", "machine", "OMP_NUM_THREADS", "versions")
DIFFERENCES = ("loss_difference", "gradient_difference", "difference")  # from OpenCLIP; shown in one column
MAY_LACK = ("target", *DIFFERENCES)  # not every case of a table has them
RANGE = ("ratio", "lowest_ratio", "highest_ratio")  # of one number with its range
NAMES = {
    "seconds_per_caption": "s per caption",
    "peak_MB": "peak memory, MB",
    "equal": "captions equal to OpenCLIP's",
    "repetitions": "turns",
    "speed": "times the speed",
    "memory": "share of the memory",
    "score": "",
    "case": "",
    "seconds": "s",
    "theirs s": "theirs, s",
    "ours s": "ours, s",
    "their CLIP s": "their CLIP, s",
    "our CLIP s": "our CLIP, s",
}
SEVERAL = 3  # rows of one case in a row have a heading


def tables() -> dict[str, str]:
    return {f"benchmarks/{path.stem}": table(path) for path in sorted(FOLDER.glob("*.csv"))}


def table(path: Path) -> str:
    """Markdown of a CSV that `record` wrote."""
    everything = read_rows(path)
    # A case that was measured again keeps its place.
    rows = list({tuple(row.get(column) or "" for column in CASES): row for row in everything}.values())
    families: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        measured = tuple(c for c in row if row[c] and c not in (*ABOUT, *MAY_LACK))
        families.setdefault(measured, []).append(row)
    parts = [_family(family) for family in families.values()]
    last = everything[-1]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    machines = ", ".join(dict.fromkeys(row["machine"] for row in rows))
    about = f"`{last['command'].split(' --')[0]}` at commit {commits}, {machines}; {last['versions']}."
    return "\n\n".join([*parts, about])


def _family(rows: Sequence[Row]) -> str:
    """A table of rows with the same columns, and below it what is the same in all of them."""
    rows = [_merged(row) for row in rows]
    columns = [c for c in rows[0] if c not in ABOUT and any(row[c] for row in rows)]
    same = {c: rows[0][c] for c in columns if len(rows) > 1 and len({row[c] for row in rows}) == 1 and c != "ratio"}
    columns = sorted((c for c in columns if c not in same), key=lambda c: c not in CASES)  # names first
    heading = columns[0] if _repeats(columns[0], rows) else None
    if heading is not None:
        columns.remove(heading)
    lines: list[list[str]] = []
    for i, row in enumerate(rows):
        if heading is not None and (i == 0 or rows[i - 1][heading] != row[heading]):
            lines.append([row[heading]])
        lines.append([_cell(c, row[c]) for c in columns])
    shared = "; ".join(f"{_name(c)}: {_cell(c, value)}".removeprefix(": ") for c, value in same.items())
    text = markdown(Table("", [_name(c) for c in columns], lines))
    return f"{text}\n\nIn all rows: {shared}." if shared else text


def _merged(row: Row) -> Row:
    """The row with one column for the ratio and its range, and one for all differences from OpenCLIP."""
    middle, low, high = (row.get(column) or "" for column in RANGE)
    merged = {c: value for c, value in row.items() if c not in (*RANGE[1:], *DIFFERENCES)}
    if high:
        merged[RANGE[0]] = f"{float(middle):.3g} ({float(low):.3g}-{float(high):.3g})"
    found = {_plain(c).removesuffix("difference"): row[c] for c in DIFFERENCES if row.get(c)}
    if any(c in row for c in DIFFERENCES):
        merged["difference"] = ", ".join(f"{name}{_cell(name, value)}" for name, value in found.items())
    return merged


def _repeats(column: str, rows: Sequence[Row]) -> bool:
    counts = [sum(row[column] == other[column] for other in rows) for row in rows]
    return column in CASES and min(counts) >= SEVERAL and len({row[column] for row in rows}) > 1


def _name(column: str) -> str:
    return score_name(column) if "recall@" in column else NAMES.get(column, _plain(column))


def _plain(column: str) -> str:
    return column.replace("_", " ")


def _cell(column: str, text: str) -> str:
    """Numbers with four significant digits at most, thousands set apart, recall in percent."""
    if not re.fullmatch(r"-?\d+(\.\d+)?(e[+-]?\d+)?", text):
        return text
    value = float(text) * (100 if "recall@" in column else 1)
    if value and (abs(value) < 1e-3):
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
