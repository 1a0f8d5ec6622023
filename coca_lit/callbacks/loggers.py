"""Logs of a run besides the trackers of `coca_lit.callbacks.tracking`: `metrics.csv`, and what each logger is told."""

import csv
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from coca_lit.files import Waiting, append_lines, atomic_write, csv_line, whole_lines
from coca_lit.models import part_sizes
from coca_lit.runs.run_folder import METRICS, environment


class MetricsLog(Logger):
    """Appends a row per logged step to `metrics.csv`, which is on disk as soon as it is logged, or as soon as the disk
    takes it. A metric that appears later becomes a further column. Lightning's own CSV logger keeps rows in memory and
    deletes the file of an earlier process.

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
            columns = sorted([*self._columns, *new])
            before = [[row.get(name, "") for name in columns] for row in csv.DictReader(whole_lines(self.path))]
            atomic_write(self.path, "".join(f"{csv_line(row)}\n" for row in [columns, *before]).encode())
            self._columns = columns
        append_lines(self.path, [csv_line(row.get(name, "") for name in self._columns) for row in rows])


class LogRunFacts(L.Callback):
    """Tells every logger besides the CSV, a user's own included, what is trained, as hyperparameters.

    Args:
        config: returns the run's config, resolved and without secrets.
    """

    def __init__(self, config: Callable[[], dict[str, Any]]) -> None:
        self.config = config

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loggers = [logger for logger in trainer.loggers if not isinstance(logger, MetricsLog)]
        if loggers and trainer.is_global_zero:
            sizes = part_sizes(getattr(pl_module, "net", pl_module))
            facts = {"parameters": sizes, "environment": environment()}
            for logger in loggers:
                logger.log_hyperparams(self.config() | facts)


@runtime_checkable
class PictureLog(Protocol):
    """A logger that takes pictures, too."""

    def log_picture(self, name: str, path: Path, step: int) -> None: ...


def log_pictures(trainer: L.Trainer, folder: Path, evaluations: list[str], step: int) -> None:
    """Sends the sheets of captions and of retrieval that evaluations have written to all loggers that take pictures."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, PictureLog)]
    if loggers and trainer.is_global_zero:
        for name in (f"{evaluation}{kind}" for evaluation in evaluations for kind in ("", "_retrieval")):
            if (path := folder / f"{name}.png").is_file():
                for logger in loggers:
                    logger.log_picture(f"samples/{name}", path, step)
