"""Logs of a run: `metrics.csv`; TensorBoard and W&B; and what each logger is told.

Each tracker gets the config, the model's size, the state of the code, scores and samples, and goes on in the same run
after a kill, with every step once. A run that resumes repeats the steps since its last checkpoint, with the same
values, bit by bit. TensorBoard's readers drop what came before; to W&B, which keeps whatever it got, a step that it has
is not sent again. Other loggers are Lightning's own.
"""

import csv
import logging
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import lightning.pytorch as L
import numpy as np
import yaml
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor

from coca_lit.files import Waiting, append_lines, atomic_write, csv_line, whole_lines
from coca_lit.models import part_sizes
from coca_lit.runs.redaction import redact
from coca_lit.runs.run_folder import METRICS, environment

log = logging.getLogger(__name__)

SOON = 60.0  # seconds until a disk that was full is tried again


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
        new = {name for row in rows for name in row if name not in self._columns}
        if new:
            columns = sorted([*self._columns, *new])
            before = [[row.get(name, "") for name in columns] for row in csv.DictReader(whole_lines(self.path))]
            atomic_write(self.path, "".join(f"{csv_line(row)}\n" for row in [columns, *before]).encode())
            self._columns = columns
        append_lines(self.path, [csv_line(row.get(name, "") for name in self._columns) for row in rows])


class TensorBoardLog(TensorBoardLogger):
    """Lightning's, whose readers drop everything that an earlier process wrote from the resumed step on. A full disk
    costs rows and not the run.

    Args:
        output_dir: the run folder.
        logged_steps: the steps that stay, of a run that resumes.
    """

    def __init__(
        self, output_dir: str | Path, name: str = "tensorboard", version: str = "", logged_steps: int = 0
    ) -> None:
        super().__init__(output_dir, name, version, default_hp_metric=False, purge_step=logged_steps)
        self._has_warned = False
        self._paused_until = 0.0

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        super().log_hyperparams(params, *args, **kwargs)
        lines = yaml.safe_dump(params, sort_keys=False).splitlines() if isinstance(params, dict) else []
        self.experiment.add_text("config", "\n".join(f"    {line}" for line in lines))  # as code in Markdown

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.attempt(partial(super().log_metrics, metrics, step))

    @rank_zero_only
    def log_picture(self, name: str, path: Path, step: int) -> None:
        picture = np.asarray(Image.open(path))
        self.attempt(lambda: self.experiment.add_image(name, picture, step, dataformats="HWC"))

    @rank_zero_only
    def save(self) -> None:
        self.attempt(super().save)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.attempt(partial(super().finalize, status))

    def attempt(self, write: Callable[[], object]) -> None:
        """Calls `write`, unless it failed a short while ago. After an error in its thread a writer takes nothing any
        more: later rows go to another file.
        """
        if time.monotonic() < self._paused_until:
            return
        try:
            write()
        except Exception as error:
            if not self._has_warned:
                log.warning(
                    "TensorBoardLog: %s; the run continues, and metrics.csv has all rows", error.__cause__ or error
                )
            self._has_warned = True
            with suppress(Exception):
                self.experiment.close()
            self._experiment = None
            self._kwargs["purge_step"] = None  # the rows before stay
            self._paused_until = time.monotonic() + SOON


class WandbLog(WandbLogger):
    """Lightning's, in the same W&B run after a kill, whose steps are W&B's own.

    W&B takes rows in another process, which may lose the last ones when this one is killed. So a process that resumes
    sends the rows of `metrics.csv` that W&B lacks. Offline, W&B does not know what earlier processes logged: the
    newest of the run's folders holds all of it.

    Args:
        output_dir: the run folder, whose file `wandb_run` keeps the id of the W&B run.
        same_run: whether the run resumes; otherwise W&B gets a new one.
        settings: of `wandb.init`, too: `tags`, `entity`, `group` (by default what precedes the last slash of `name`).
    """

    def __init__(self, output_dir: str | Path, same_run: bool = False, **settings: Any) -> None:
        self.folder = Path(output_dir)
        self.id_file = self.folder / "wandb_run"
        self.resumes = same_run and self.id_file.exists()
        run_id = self.id_file.read_text(encoding="utf-8").strip() if self.resumes else uuid4().hex[:8]
        self.first_step = 0  # that W&B lacks
        group = str(settings.get("name") or "").rpartition("/")[0] or None
        defaults = {"id": run_id, "resume": "allow", "group": group}
        super().__init__(save_dir=output_dir, **{**defaults, **settings})

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run. It is begun with masked arguments, of which W&B keeps a record."""
        if self._experiment is not None:
            return super().experiment
        given = sys.argv
        try:
            sys.argv = [given[0], *map(redact, given[1:])]
            return super().experiment
        finally:
            sys.argv = given

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        atomic_write(self.id_file, f"{self.experiment.id}\n".encode())  # by now what an earlier run left is archived
        super().log_hyperparams(params)
        if self.resumes:
            self.first_step = self.experiment.step
            for row in csv.DictReader(whole_lines(self.folder / METRICS)):
                if row["step"].isdigit():
                    values = {name: float(value) for name, value in row.items() if value and name != "step"}
                    self.log_metrics(values, int(row["step"]))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        assert step is not None  # Lightning and our callbacks always tell it
        if step >= self.first_step:
            self.experiment.log({**metrics, "trainer/global_step": step}, step=step)
        elif step == self.first_step - 1:  # scores that were made again, or added, after that row was sent
            self.experiment.summary.update(dict(metrics))

    @rank_zero_only
    def log_picture(self, name: str, path: Path, step: int) -> None:
        if step > self.first_step:  # in the current row: the one of this step may not be complete yet
            image: Any = import_module("wandb").Image(str(path))
            self.experiment.log({name: image}, commit=False)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends the W&B run: the next job of a sweep in this process is another one."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(status != "success"))
            self._experiment = None


class LogHyperparameters(L.Callback):
    """Tells every logger besides the CSV, a user's own included, what is trained, as hyperparameters.

    Args:
        config: returns the run's config, resolved and without secrets.
    """

    def __init__(self, config: Callable[[], dict[str, Any]]) -> None:
        self.config = config

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Also where training is over and only scores are left to log."""
        loggers = [logger for logger in trainer.loggers if not isinstance(logger, MetricsLog)]
        if loggers and trainer.is_global_zero:
            sizes = part_sizes(getattr(pl_module, "net", pl_module))
            known = self.config() | {"parameters": sizes, "environment": environment()}
            for logger in loggers:
                logger.log_hyperparams(known)


def log_pictures(trainer: L.Trainer, folder: Path, evaluations: list[str], step: int) -> None:
    """Sends the sheets of captions and of retrieval that evaluations have written to all loggers that take pictures."""
    loggers: list[Any] = [logger for logger in trainer.loggers if hasattr(logger, "log_picture")]
    if loggers and trainer.is_global_zero:
        for name in (f"{evaluation}{kind}" for evaluation in evaluations for kind in ("", "_retrieval")):
            path = folder / f"{name}.png"
            if path.is_file():
                for logger in loggers:
                    logger.log_picture(f"samples/{name}", path, step)
