"""What a run appends to while it trains, `metrics.csv` and `bad_steps.jsonl`, and how both are rewound when it resumes.

Every line is on disk as soon as it is logged. Lightning's own CSV logger keeps rows in memory and deletes the file of
an earlier process.
"""

import csv
import json
from argparse import Namespace
from itertools import takewhile
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from coca_lit.files import append_lines, atomic_write, csv_line, whole_lines

METRICS, BAD_STEPS = "metrics.csv", "bad_steps.jsonl"


class MetricsLog(Logger):
    """Appends a row per logged step to `metrics.csv`. A metric that appears later becomes a further column.

    Args:
        save_dir: the run folder.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(save_dir) / METRICS
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The config is in the run folder already."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {name: v.item() if isinstance(v, Tensor) else v for name, v in metrics.items()} | {"step": step}
        if self._columns is None:
            self._columns = next(csv.reader(whole_lines(self.path)), [])
        if new := [name for name in row if name not in self._columns]:
            self._widen(sorted([*self._columns, *new]))
        append_lines(self.path, [csv_line(row.get(name, "") for name in self._columns)])

    def _widen(self, columns: list[str]) -> None:
        """Rewrites the rows under a new header, atomically."""
        rows = [[row.get(name, "") for name in columns] for row in csv.DictReader(whole_lines(self.path))]
        atomic_write(self.path, "".join(f"{csv_line(row)}\n" for row in [columns, *rows]).encode())
        self._columns = columns


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
        lines = (line for line in whole_lines(bad_steps) if json.loads(line)["step"] < step)
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
    """Whether a row of metrics.csv is that of a validation."""
    return any(value for name, value in zip(header, row, strict=True) if name.startswith("val/"))
