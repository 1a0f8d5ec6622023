"""A CSV for every question of the study of scale, and tables of two."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coca_lit.tools.report.tables import Table, markdown
from experiments.study import Row, read_rows, write_rows, write_tables

FOLDER = Path(__file__).resolve().parent


def tables() -> dict[str, str]:
    throughput = [row for row in read_rows(FOLDER / "throughput.csv") if row["GPUs"] == "384"]
    return {"scale/throughput": _table(throughput), "scale/failures": _table(read_rows(FOLDER / "failures.csv"))}


def record(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes NAME.csv, and the tables into the README."""
    write_rows(FOLDER / f"{name}.csv", rows)
    write_tables(tables())


def _table(rows: Sequence[Row]) -> str:
    return markdown(Table("", list(rows[0]), [[_shown(cell) for cell in row.values()] for row in rows]))


def _shown(cell: str) -> str:
    """Whole numbers in full, others with two significant digits."""
    try:
        number = float(cell)
    except ValueError:
        return cell
    return f"{number:,.0f}" if "." not in cell or abs(number) >= 100 else f"{number:.2g}"
