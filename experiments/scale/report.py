"""A CSV and a table for every question of the study of scale."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coca_lit.tools.report.tables import Table, markdown
from experiments.study import read_rows, write_rows, write_tables

FOLDER = Path(__file__).resolve().parent


def tables() -> dict[str, str]:
    return {f"scale/{path.stem}": _table(path) for path in sorted(FOLDER.glob("*.csv"))}


def record(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes NAME.csv, and its table into the README."""
    write_rows(FOLDER / f"{name}.csv", rows)
    write_tables(tables())


def _table(path: Path) -> str:
    rows = read_rows(path)
    return markdown(Table(path.stem, list(rows[0]), [[_shown(cell) for cell in row.values()] for row in rows]))


def _shown(cell: str) -> str:
    """Whole numbers in full, others with two significant digits."""
    try:
        number = float(cell)
    except ValueError:
        return cell
    return f"{number:,.0f}" if "." not in cell or abs(number) >= 100 else f"{number:.2g}"
