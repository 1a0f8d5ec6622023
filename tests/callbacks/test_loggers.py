"""TensorBoard, W&B and MLflow, the real ones, read back with their own readers. Nothing leaves this machine."""

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
from lightning.pytorch.loggers import Logger

from coca_lit.callbacks import loggers as loggers_module
from coca_lit.runs.resume import is_same_run
from coca_lit.runs.run_folder import start_run_folder
from helpers.resuming import MAP, TINY, Die, train
from helpers.running import compose, run, watched, without_java

TRACKERS = ("tensorboard", "wandb", "mlflow")
PART = "coca_lit.callbacks.loggers"
QUICK = {"WANDB_SILENT": "true", "WANDB__DISABLE_STATS": "true", "WANDB__DISABLE_META": "true"}  # not on trial here


def loggers(folder: Path, *names: str) -> list[str]:
    """Overrides for these loggers in one run; loggers whose packages are missing are skipped, visibly if it is one."""
    store = f"tracking_uri: 'sqlite:///{folder.parent}/mlflow.db', artifact_location: 'file://{folder.parent}/mlruns'"
    nodes = {
        "tensorboard": f"{{_target_: {PART}.TensorBoardLog, output_dir: '{folder}'}}",
        "wandb": f"{{_target_: {PART}.WandbLog, output_dir: '{folder}', project: tests, tags: [small], "
        "offline: true, name: demo/first}",
        "mlflow": "{_target_: lightning.pytorch.loggers.MLFlowLogger, experiment_name: coca_lit, "
        f"run_name: first, {store}}}",
    }
    return [f"+logger.{name}={nodes[name]}" for name in names]


def scalars(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()


def mlflow_runs(folder: Path) -> tuple[Any, list[Any]]:
    """The client, and the runs in the store, the first one first."""
    client = pytest.importorskip("mlflow").MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client, list(reversed(client.search_runs(experiments)))


def wandb_runs(folder: Path) -> dict[str, list[Any]]:
    """The records of each W&B run, of its last process: offline, that one holds all steps."""
    pytest.importorskip("wandb")
    found: dict[str, list[list[Any]]] = {}
    for path in sorted(p for p in folder.glob("wandb/*/run-*.wandb") if not p.parent.is_symlink()):
        found.setdefault(path.stem.removeprefix("run-"), []).append([*wandb_records(path)])
    return {run: processes[-1] for run, processes in found.items()}


def wandb_records(path: Path) -> Iterator[Any]:
    """The records in a transaction log, what `wandb sync` sends, up to where a kill has cut it off.

    It is in LevelDB's log format: blocks of 32 kB with parts of records, each after its checksum, length and kind.
    """
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
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


def rows(records: list[Any]) -> Iterator[dict[str, Any]]:
    for record in records:
        if record.history.item:
            yield {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}


def steps(folder: Path, tracker: str) -> list[list[int]]:
    """The steps of a loss in every run of the tracker, in the order of the steps."""
    name = "train/caption_loss"
    if tracker == "tensorboard":
        return [[scalar.step for scalar in scalars(folder).Scalars(name)]]
    if tracker == "wandb":
        runs = wandb_runs(folder).values()
        return [sorted(row["trainer/global_step"] for row in rows(records) if name in row) for records in runs]
    client, runs = mlflow_runs(folder)
    return [sorted(point.step for point in client.get_metric_history(run.info.run_id, name)) for run in runs]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that was killed two steps after a checkpoint, and then trained to its end."""
    names = [name for name in TRACKERS if _installed(name)]
    folder = tmp_path_factory.mktemp("trackers") / "run"
    overrides = [*MAP, *loggers(folder, *names), "callbacks.checkpoint.every_n_steps=3"]
    log = folder.parent / "run.log"
    assert train(folder, *overrides, watch=Die(5), environment=QUICK) == -signal.SIGKILL, log.read_text()
    assert train(folder, *overrides, environment=QUICK) == 0, log.read_text()
    return folder, overrides


def _installed(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize(
    ("tracker", "logged"),
    [
        ("tensorboard", [[*range(12)]]),
        ("wandb", [[*range(12)]]),
        ("mlflow", [[*range(4)], [*range(3, 12)]]),  # in a run of its own, with the steps since the checkpoint
    ],
)
@pytest.mark.slow
def test_every_step_after_a_kill(killed: tuple[Path, list[str]], tracker: str, logged: list[list[int]]) -> None:
    pytest.importorskip(tracker)
    assert steps(killed[0], tracker) == logged


def test_a_tracker_that_fails_costs_its_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(loggers_module, "SOON", 0.0)
    log = loggers_module.TensorBoardLog(tmp_path)
    log.log_metrics({"loss": 1.0}, 0)
    log.save()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(log.experiment, "add_scalar", full)
        log.log_metrics({"loss": 2.0}, 1)
    log.log_metrics({"loss": 3.0}, 2)
    log.finalize("success")
    assert {scalar.value for scalar in scalars(tmp_path).Scalars("loss")} == {1.0, 3.0}
    (said,) = [message for message in caplog.messages if "No space left" in message]
    assert said.startswith("TensorBoardLog: ")


@pytest.mark.slow
def test_a_new_start_is_a_new_run(killed: tuple[Path, list[str]]) -> None:
    folder, overrides = killed
    assert train(folder, *overrides, "ckpt_path=null", "trainer.max_epochs=1", environment=QUICK) == 0
    for tracker in filter(_installed, ("tensorboard", "wandb")):
        assert steps(folder, tracker) == [[*range(6)]]
    if _installed("wandb"):  # the earlier one was archived with its files
        assert steps(folder / "earlier_1", "wandb") == [[*range(12)]]


@pytest.mark.slow
def test_a_run_that_died_before_its_first_checkpoint_is_the_same_run(tmp_path: Path) -> None:
    words = ("trainer=cpu", "name=test", f"output_dir={tmp_path}")
    assert not is_same_run(compose(*words), None)
    start_run_folder(compose(*words))
    assert is_same_run(compose(*words), None)
    assert not is_same_run(compose(*words, "seed=1"), None)
    assert not is_same_run(compose(*words, "ckpt_path=null"), None)


class Told(Logger):
    """What a logger of the user's own is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    @property
    def name(self) -> str:
        return "told"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self.told.append(f"seed {params['seed']}")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.told += [name for name in metrics if name == "scenes/t2i_recall@1"]


class With(L.Callback):
    """Gives the trainer a further logger."""

    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.loggers = [*trainer.loggers, self.logger]


def test_loggers_are_told_what_was_trained_where_only_scores_are_left(tmp_path: Path) -> None:
    """Before the scores: by then W&B must know what it has of this run."""
    words = (*TINY, "data.train_count=8", "trainer.max_steps=2", "trainer.limit_val_batches=0", "report=null")
    for _ in range(2):
        log = Told()
        with watched(With(log)):
            run(tmp_path, *words, "scoring.every_n_epochs=null")
        assert log.told == ["seed 0", "scenes/t2i_recall@1"]
        (tmp_path / "results.json").unlink()


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with captions and retrieval, scored in its middle and at its end."""
    folder = tmp_path_factory.mktemp("scored") / "run"
    with pytest.MonkeyPatch.context() as patch:
        without_java(patch)
        for name, value in QUICK.items():
            patch.setenv(name, value)
        names = [name for name in TRACKERS if _installed(name)]
        small = ("trainer=cpu", "trainer.max_epochs=3", "data.train_count=16", "data.batch_size=8", "scoring.images=6")
        evals = ("evals=[scenes_captions,scenes_retrieval]", "model.net.name=coca_tiny", "image_size=32")
        run(folder, *small, *evals, *loggers(folder, *names), "trainer.log_every_n_steps=1")
    return folder


SHEETS = ("samples/scenes", "samples/scenes_retrieval")


@pytest.mark.slow
def test_tensorboard_has_scores_config_and_samples(scored: Path) -> None:
    pytest.importorskip("tensorboard")
    events = scalars(scored)
    assert [scalar.step for scalar in events.Scalars("scenes/CIDEr")][-1] == 6
    assert {*SHEETS} <= {*events.Tags()["images"]}
    assert [image.step for image in events.Images(SHEETS[0])] == [4, 6]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "lr:" in text
    assert "image encoder:" in text
    assert "commit:" in text


@pytest.mark.slow
def test_wandb_has_scores_config_samples_group_and_tags(scored: Path) -> None:
    ((name, records),) = wandb_runs(scored).items()
    assert name == (scored / "wandb_run").read_text().strip()
    (described,) = [record.run for record in records if record.run.run_id]
    assert (described.run_group, list(described.tags), described.display_name) == ("demo", ["small"], "demo/first")
    config = {
        update.key: json.loads(update.value_json) for record in records for update in record.config.update if update.key
    }
    assert config["data"]["batch_size"] == 8
    assert config["parameters"]["image encoder"] > 1000
    assert "commit" in config["environment"]
    found = [*rows(records)]
    assert any("scenes/CIDEr" in row and row["trainer/global_step"] == 6 for row in found)
    sheets = {name for row in found for name in row if name.startswith("samples/")}
    assert {*SHEETS} <= {sheet.partition(".")[0] for sheet in sheets}
    assert len([*scored.glob("wandb/offline-*/files/media/images/samples/*.png")]) == 3


@pytest.mark.slow
def test_wandb_records_masked_arguments(tmp_path: Path) -> None:
    """In a process of its own, as W&B keeps what it first saw."""
    pytest.importorskip("wandb")
    code = (
        "import sys\nfrom coca_lit.callbacks.loggers import WandbLog\n"
        "logger = WandbLog(sys.argv[1], project='tests', offline=True)\n"
        "logger.log_hyperparams({'seed': 1})\nlogger.finalize('success')\n"
    )
    clean = {name: value for name, value in os.environ.items() if name not in QUICK}
    words = [str(tmp_path), "+logger.mlflow.tags={password: hunter3pw}", "seed=1"]
    subprocess.run([sys.executable, "-c", code, *words], env=clean, check=True, timeout=300)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.suffix == ".wandb" for path in files)
    assert b"hunter3pw" not in b"".join(path.read_bytes() for path in files)


@pytest.mark.slow
def test_mlflow_has_scores_and_config(scored: Path) -> None:
    _, (only,) = mlflow_runs(scored)
    assert (only.info.run_name, only.info.status) == ("first", "FINISHED")
    assert only.data.params["data/batch_size"] == "8"
    assert int(only.data.params["parameters/image encoder"]) > 1000
    assert "environment/commit" in only.data.params
    assert {"scenes/CIDEr", "scenes/t2i_recall1"} <= only.data.metrics.keys()
