"""TensorBoard, W&B and MLflow: each gets the config, the model's size, the state of the code, scores and samples, and
goes on in the same run after a kill, with every step once.

A run that resumes repeats the steps since its last checkpoint. TensorBoard's readers can drop what came before; W&B and
MLflow keep whatever they got, so a step that they have is not sent again. Its values would be the same, bit by bit.
"""

import csv
import struct
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from uuid import uuid4

import lightning.pytorch as L
import numpy as np
import yaml
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from coca_lit.callbacks.metrics_log import MetricsLog
from coca_lit.files import atomic_write, whole_lines
from coca_lit.models import part_sizes
from coca_lit.runs.launch import is_first_process
from coca_lit.runs.logs import METRICS
from coca_lit.runs.resume import read_run
from coca_lit.runs.run_folder import environment


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


class TensorBoardLog(TensorBoardLogger):
    """Lightning's, whose readers drop everything that an earlier process wrote from the resumed step on.

    Args:
        output_dir: the run folder.
        resumed_from: the checkpoint that the run resumes from, if it does.
    """

    def __init__(
        self, output_dir: str | Path, name: str = "tensorboard", version: str = "", resumed_from: Path | None = None
    ) -> None:
        step = read_run(resumed_from).get("logged_steps", 0) if resumed_from is not None and is_first_process() else 0
        super().__init__(output_dir, name, version, default_hp_metric=False, purge_step=step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        super().log_hyperparams(params, *args, **kwargs)
        lines = yaml.safe_dump(params, sort_keys=False).splitlines() if isinstance(params, dict) else []
        self.experiment.add_text("config", "\n".join(f"    {line}" for line in lines))  # as code in Markdown

    @rank_zero_only
    def log_picture(self, name: str, path: Path, step: int) -> None:
        self.experiment.add_image(name, np.asarray(Image.open(path)), step, dataformats="HWC")


Logged = set[tuple[int, str]]  # (step, name of a metric)


class KeptRun:
    """The name that a tracker gave to a run, in a file of the run folder; and what the tracker has of it.

    Args:
        same_run: whether the run resumes; otherwise the tracker gets a new one.
    """

    def __init__(self, path: Path, same_run: bool) -> None:
        self.path = path
        self.name = path.read_text().strip() if same_run and path.exists() else None
        self.logged: Logged = set()
        self._kept = False

    def keep(self, name: str) -> None:
        """Not before something is logged: what an earlier run left is archived by then."""
        if not self._kept:
            atomic_write(self.path, f"{name}\n".encode())
            self._kept = True

    def unlogged(self, metrics: Mapping[str, Any], step: int | None) -> dict[str, Any]:
        return {name: value for name, value in metrics.items() if step is None or (step, name) not in self.logged}

    def repeats(self, step: int) -> bool:
        """Whether an earlier process logged this step or a later one."""
        return any(logged >= step for logged, _ in self.logged)


def logged_rows(folder: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """The rows of `metrics.csv` with their steps."""
    for row in csv.DictReader(whole_lines(folder / METRICS)):
        if row["step"].isdigit():
            yield int(row["step"]), {name: float(v) for name, v in row.items() if v and name not in ("step", "epoch")}


class WandbLog(WandbLogger):
    """Lightning's, in the same W&B run after a kill.

    W&B takes rows in another process, which loses the last ones when this one is killed. So its own files tell what it
    has, and what `metrics.csv` has besides is sent when the run resumes.

    Args:
        output_dir: the run folder.
        settings: of `wandb.init`, too: `tags`, `entity`, `group` (by default what precedes the last slash of `name`).
    """

    def __init__(self, output_dir: str | Path, same_run: bool = False, **settings: Any) -> None:
        self.folder = Path(output_dir)
        self.kept = KeptRun(self.folder / "wandb_run", same_run)
        group = str(settings.get("name") or "").rpartition("/")[0] or None
        own = {"id": self.kept.name or uuid4().hex[:8], "resume": "allow", "group": group}
        super().__init__(save_dir=output_dir, **{**own, **settings})

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        if self.kept.name is not None:
            self.kept.logged = _stored(self.folder, self.kept.name)
        self.kept.keep(self.experiment.id)
        super().log_hyperparams(params)
        if self.kept.name is not None:
            for step, metrics in logged_rows(self.folder):
                self.log_metrics(metrics, step)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if new := self.kept.unlogged(metrics, step):
            super().log_metrics(new, step)

    @rank_zero_only
    def log_picture(self, name: str, path: Path, step: int) -> None:
        if not self.kept.repeats(step):
            self.log_image(name, [str(path)], step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends the W&B run: the next job of a sweep in this process is another one."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(status != "success"))
            self._experiment = None


def _stored(folder: Path, run: str) -> Logged:
    """What W&B's files of a run hold."""
    found: Logged = set()
    for path in wandb_files(folder, run):
        for record in wandb_records(path):
            row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            if (step := row.get("trainer/global_step", "")).isdigit():
                found |= {(int(step), name) for name in row}
    return found


def wandb_files(folder: Path, run: str) -> list[Path]:
    """The transaction logs of a W&B run, one of each process, in their order: what `wandb sync` sends."""
    return sorted(p for p in folder.glob(f"wandb/*-{run}/run-{run}.wandb") if not p.parent.is_symlink())


def wandb_records(path: Path) -> Iterator[Any]:
    """The records in one of them, up to where a kill has cut it off.

    It is in LevelDB's log format: blocks of 32 kB with parts of records, each after its checksum, length and kind.
    """
    messages: Any = import_module("wandb.proto.wandb_internal_pb2")
    content = path.read_bytes()
    at, parts = 7, b""  # after the head of the file
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if at + 7 + length > len(content):
            return
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield messages.Record.FromString(parts)
            parts = b""


class MLflowLog(MLFlowLogger):
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
        self.kept = KeptRun(Path(output_dir) / "mlflow_run", same_run)
        if self.kept.name is not None:  # before the rows of the steps that are repeated are dropped
            self.kept.logged = {(step, name) for step, row in logged_rows(Path(output_dir)) for name in row}
        super().__init__(
            experiment_name=experiment_name,
            run_name=run_name,
            tracking_uri=tracking_uri,
            tags=tags,
            artifact_location=artifact_location,
            run_id=self.kept.name,
        )

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """MLflow refuses another value for a parameter that it has, such as the number of workers of a resumed run."""
        assert self.run_id is not None
        self.kept.keep(self.run_id)
        if self.kept.name is None:
            super().log_hyperparams(params)
        else:
            self.experiment.update_run(self.run_id, status="RUNNING")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert self.run_id is not None
        self.kept.keep(self.run_id)
        # MLflow takes no "@" in names: Lightning would drop it with a warning at every recall@1.
        if new := self.kept.unlogged(metrics, step):
            super().log_metrics({name.replace("@", "_at_"): value for name, value in new.items()}, step)

    @rank_zero_only
    def log_picture(self, name: str, path: Path, step: int) -> None:
        assert self.run_id is not None
        if not self.kept.repeats(step):
            self.experiment.log_artifact(self.run_id, str(path), f"{Path(name).parent}/step_{step}")
