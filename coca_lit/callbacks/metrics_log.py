"""`metrics.csv`: every row is on disk as soon as it is logged, or as soon as the disk takes it. Lightning's own CSV
logger keeps rows in memory and deletes the file of an earlier process.
"""

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from coca_lit.files import Waiting, append_lines, atomic_write, csv_line, whole_lines
from coca_lit.runs.logs import METRICS


class MetricsLog(Logger):
    """Appends a row per logged step to `metrics.csv`. A metric that appears later becomes a further column.

    Args:
        output_dir: the run folder.
    """

    def __init__(self, output_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(output_dir) / METRICS
        self._columns: list[str] = []
        self._waiting: Waiting[dict[str, Any]] = Waiting(self.path, self._write)

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
        values = {name: v.item() if isinstance(v, Tensor) else v for name, v in metrics.items()}
        self._waiting.add(values | {"step": step})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._waiting.flush(last=status != "success")  # else `finish_run` tries again

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if not self._columns or not self.path.exists():
            self._columns = next(csv.reader(whole_lines(self.path)), [])
        if new := {name for row in rows for name in row if name not in self._columns}:
            self._widen(sorted([*self._columns, *new]))
        append_lines(self.path, [csv_line(row.get(name, "") for name in self._columns) for row in rows])

    def _widen(self, columns: list[str]) -> None:
        """Rewrites the rows under a new header, atomically."""
        rows = [[row.get(name, "") for name in columns] for row in csv.DictReader(whole_lines(self.path))]
        atomic_write(self.path, "".join(f"{csv_line(row)}\n" for row in [columns, *rows]).encode())
        self._columns = columns
