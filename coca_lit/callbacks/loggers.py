"""Logs of a run: `metrics.csv`; TensorBoard, W&B and MLflow; and what each logger is told.

Each tracker gets the config, the model's size, the state of the code, scores and samples, and goes on in the same run
after a kill, with every step once. A run that resumes repeats the steps since its last checkpoint, with the same
values, bit by bit. TensorBoard's readers drop what came before; to W&B and MLflow, which keep whatever they got, a step
that they have is not sent again.
"""

import csv
import logging
import os
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
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor

from coca_lit.files import Waiting, append_lines, atomic_write, csv_line, whole_lines
from coca_lit.models import part_sizes
from coca_lit.runs.redaction import redact
from coca_lit.runs.run_folder import METRICS, environment

log = logging.getLogger(__name__)

SLOW, AGAIN = 5.0, 600.0  # seconds in vain after which a server is left alone, and for how long
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
        if new := {name for row in rows for name in row if name not in self._columns}:
            columns = sorted([*self._columns, *new])
            before = [[row.get(name, "") for name in columns] for row in csv.DictReader(whole_lines(self.path))]
            atomic_write(self.path, "".join(f"{csv_line(row)}\n" for row in [columns, *before]).encode())
            self._columns = columns
        append_lines(self.path, [csv_line(row.get(name, "") for name in self._columns) for row in rows])


class Tolerant:
    """A tracker for which a full disk, or a server that is away, costs rows of its own and not the run."""

    _told = False
    _away_until = 0.0

    def attempt(self, send: Callable[[], object]) -> None:
        """Calls `send`, unless it took long in vain a short while ago, as where a server does not answer."""
        begun = time.monotonic()
        if begun < self._away_until:
            return
        try:
            send()
        except Exception as error:
            if not self._told:
                why = redact(str(error.__cause__ or error))
                log.warning("%s: %s; the run continues, and metrics.csv has all rows", type(self).__name__, why)
            self._told, now = True, time.monotonic()
            self._away_until = now + AGAIN if now - begun > SLOW else 0.0
            self.failed()

    def failed(self) -> None:
        """What is left to do after an error."""


class TensorBoardLog(Tolerant, TensorBoardLogger):
    """Lightning's, whose readers drop everything that an earlier process wrote from the resumed step on.

    Args:
        output_dir: the run folder.
        logged_steps: the steps that stay, of a run that resumes.
    """

    def __init__(
        self, output_dir: str | Path, name: str = "tensorboard", version: str = "", logged_steps: int = 0
    ) -> None:
        super().__init__(output_dir, name, version, default_hp_metric=False, purge_step=logged_steps)

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

    def failed(self) -> None:
        """After an error in its thread a writer takes nothing any more: later rows go to another file."""
        with suppress(Exception):
            self.experiment.close()
        self._experiment = None
        self._kwargs["purge_step"] = None  # the rows before stay
        self._away_until = time.monotonic() + SOON


class KeptName:
    """The name that a tracker gave to a run, in a file of the run folder.

    Args:
        same_run: whether the run resumes; otherwise the tracker gets a new one.
    """

    def __init__(self, path: Path, same_run: bool) -> None:
        self.path = path
        self.before = path.read_text(encoding="utf-8").strip() if same_run and path.exists() else None

    def keep(self, name: str) -> None:
        """Not before training starts: what an earlier run left is archived by then."""
        atomic_write(self.path, f"{name}\n".encode())


class WandbLog(WandbLogger):
    """Lightning's, in the same W&B run after a kill, whose steps are W&B's own.

    W&B takes rows in another process, which may lose the last ones when this one is killed. So a process that resumes
    sends the rows of `metrics.csv` that W&B lacks. Offline, W&B does not know what earlier processes logged: the
    newest of the run's folders holds all of it.

    Args:
        output_dir: the run folder.
        settings: of `wandb.init`, too: `tags`, `entity`, `group` (by default what precedes the last slash of `name`).
    """

    def __init__(self, output_dir: str | Path, same_run: bool = False, **settings: Any) -> None:
        self.folder = Path(output_dir)
        self.kept = KeptName(self.folder / "wandb_run", same_run)
        self.first_step = 0  # that W&B lacks
        group = str(settings.get("name") or "").rpartition("/")[0] or None
        own = {"id": self.kept.before or uuid4().hex[:8], "resume": "allow", "group": group}
        super().__init__(save_dir=output_dir, **{**own, **settings})

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
        self.kept.keep(self.experiment.id)
        super().log_hyperparams(params)
        if self.kept.before is not None:
            self.first_step = self.experiment.step
            for row in csv.DictReader(whole_lines(self.folder / METRICS)):
                if row["step"].isdigit():
                    values = {name: float(value) for name, value in row.items() if value and name != "step"}
                    self.log_metrics(values, int(row["step"]))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if step is None:
            super().log_metrics(metrics)
        elif step >= self.first_step:
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


class MLflowLog(Tolerant, MLFlowLogger):
    """Lightning's, in the same MLflow run after a kill.

    Args:
        output_dir: the run folder.
        tracking_uri: a store, such as `sqlite:///mlflow.db`, or the address of a server.
    """

    def __init__(
        self,
        output_dir: str | Path,
        tracking_uri: str,
        experiment_name: str,
        run_name: str | None = None,
        tags: dict[str, str] | None = None,
        artifact_location: str | None = None,
        same_run: bool = False,
    ) -> None:
        self.kept = KeptName(Path(output_dir) / "mlflow_run", same_run)
        self.last = -1  # the last step of them
        self.logged: dict[tuple[int | None, str], float] = {}  # by step and name, what earlier processes logged
        for name, value in (("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"), ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")):
            os.environ.setdefault(name, value)  # all other processes wait meanwhile, by default for 20 minutes
        super().__init__(
            experiment_name=experiment_name,
            run_name=run_name,
            tracking_uri=tracking_uri,
            tags=tags,
            artifact_location=artifact_location,
            run_id=self.kept.before,
        )

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """MLflow refuses another value for a parameter that it has, such as the number of workers of a resumed run."""
        assert self.run_id is not None
        self.kept.keep(self.run_id)
        if self.kept.before is None:
            super().log_hyperparams(params)
            return
        self.experiment.update_run(self.run_id, status="RUNNING")
        for name in self.experiment.get_run(self.run_id).data.metrics:
            history = self.experiment.get_metric_history(self.run_id, name)
            self.logged |= {(point.step, name): point.value for point in history}
        self.last = max((step for step, _ in self.logged if step is not None), default=0)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # MLflow takes no "@" in names: Lightning would drop it with a warning at every recall@1.
        named = {name.replace("@", "_at_"): value for name, value in metrics.items()}
        known = {name for name in named if (step, name) in self.logged}
        if step == self.last:  # scores may be made again, of other images
            known = {name for name in known if self.logged[step, name] == named[name]}
        if new := {name: value for name, value in named.items() if name not in known}:
            self.attempt(partial(super().log_metrics, new, step))

    @rank_zero_only
    def log_picture(self, name: str, path: Path, step: int) -> None:
        assert self.run_id is not None  # a repeated step replaces the picture
        place = f"{Path(name).parent}/step_{step}"
        self.attempt(partial(self.experiment.log_artifact, self.run_id, str(path), place))

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        self.attempt(partial(super().finalize, status))


class LogRunFacts(L.Callback):
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
            facts = {"parameters": sizes, "environment": environment()}
            for logger in loggers:
                logger.log_hyperparams(self.config() | facts)


def log_pictures(trainer: L.Trainer, folder: Path, evaluations: list[str], step: int) -> None:
    """Sends the sheets of captions and of retrieval that evaluations have written to all loggers that take pictures."""
    loggers: list[Any] = [logger for logger in trainer.loggers if hasattr(logger, "log_picture")]
    if loggers and trainer.is_global_zero:
        for name in (f"{evaluation}{kind}" for evaluation in evaluations for kind in ("", "_retrieval")):
            if (path := folder / f"{name}.png").is_file():
                for logger in loggers:
                    logger.log_picture(f"samples/{name}", path, step)
