"""A CSV for every question of the study of scale, and a table of one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coca_lit.tools.report.tables import Table, markdown
from experiments.study import Row, read_rows, write_rows, write_tables

FOLDER = Path(__file__).resolve().parent
ENGINES = ("DDP", "FSDP2")


def tables() -> dict[str, str]:
    rows = read_rows(FOLDER / "throughput.csv")  # which also has fewer GPUs, and gradient caching
    return {"scale/throughput": _table([row for row in rows if row["GPUs"] == "384" and row["engine"] in ENGINES])}


def record(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes NAME.csv, and the tables into the page."""
    write_rows(FOLDER / f"{name}.csv", rows)
    write_tables(tables())


def _table(rows: Sequence[Row]) -> str:
    columns = [column for column in rows[0] if column not in ("GPUs", "at a time")]  # which are 384 and 240
    return markdown(Table("", columns, [[_shown(row[column]) for column in columns] for row in rows]))


def _shown(cell: str) -> str:
    """Whole numbers in full, others with two significant digits."""
    try:
        number = float(cell)
    except ValueError:
        return cell
    return f"{number:,.0f}" if "." not in cell or abs(number) >= 100 else f"{number:.2g}"
