"""How the logs of a run, `metrics.csv` and `bad_steps.jsonl`, are rewound when it resumes."""

import csv
from itertools import takewhile
from pathlib import Path

from coca_lit.files import atomic_write, csv_line, whole_lines
from coca_lit.reading import parse_json

METRICS, BAD_STEPS = "metrics.csv", "bad_steps.jsonl"


def rewind(folder: Path, logged_steps: int, step: int, validating: bool = False) -> None:
    """Drops log entries of steps that will be repeated, so that nothing is logged twice.

    Args:
        folder: the run folder.
        logged_steps: rows of metrics.csv are dropped from this value of the column `step` on.
        step: number of the first optimizer step that is repeated.
        validating: the validation after the last step is repeated, too.
    """
    metrics, bad_steps = folder / METRICS, folder / BAD_STEPS
    if metrics.exists():
        rows = _rows_before(logged_steps, validating, [*csv.reader(whole_lines(metrics))])
        atomic_write(metrics, "".join(f"{csv_line(row)}\n" for row in rows).encode())
    if bad_steps.exists():
        lines = (line for line in whole_lines(bad_steps) if parse_json(line, str(bad_steps), dict)["step"] < step)
        atomic_write(bad_steps, "".join(lines).encode())


def _rows_before(logged_steps: int, validating: bool, rows: list[list[str]]) -> list[list[str]]:
    """The header of metrics.csv and the rows that stay, see `rewind`."""
    if not rows:
        return []
    header = rows[0]
    column = header.index("step") if "step" in header else 0
    whole = [row for row in rows[1:] if len(row) == len(header) and row[column].isdigit()]
    kept = [row for row in whole if int(row[column]) < logged_steps]
    if validating:
        kept = [*takewhile(lambda row: int(row[column]) < logged_steps - 1 or not _validated(header, row), kept)]
    return [header, *kept]


def _validated(header: list[str], row: list[str]) -> bool:
    """Whether a row of metrics.csv comes from a validation."""
    return any(value for name, value in zip(header, row, strict=True) if name.startswith("val/"))
