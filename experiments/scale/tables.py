"""A CSV for every question of the study, and its tables in the README, `<!-- table:scale/NAME -->`, from these alone.

python experiments/scale/tables.py
"""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
README = FOLDER / "README.md"


def write(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """NAME.csv, and with it the tables of the README."""
    with (FOLDER / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    README.write_text(with_tables(README.read_text()))


def with_tables(text: str) -> str:
    """The text of the README with its tables as the CSVs have them now."""
    block = re.compile(r"(<!-- table:scale/(\w+) -->\n).*?(<!-- /table -->)", flags=re.DOTALL)
    return block.sub(lambda match: f"{match[1]}{table(match[2])}\n{match[3]}", text)


def table(name: str) -> str:
    with (FOLDER / f"{name}.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    return "\n".join(map(_line, [head, ["---"] * len(head), *([_shown(cell) for cell in row] for row in rows)]))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(cell: str) -> str:
    """Whole numbers in full, others with two digits that count."""
    try:
        number = float(cell)
    except ValueError:
        return cell
    return f"{number:,.0f}" if "." not in cell or abs(number) >= 100 else f"{number:.2g}"


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
