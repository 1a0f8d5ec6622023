"""Small trainings in processes of their own that are stopped at a given batch, and what two of them must share."""

import csv
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from coca_lit.runs.resume import RUN_KEY
from coca_lit.runs.signals import requeue_while_starting
from helpers.forking import FORKSERVER
from helpers.running import results, run, watched

# Two epochs of six batches of the smallest network that has everything, validation and scores between.
TINY = (
    *("experiment=scenes", "trainer=cpu", "trainer.max_epochs=2", "trainer.log_every_n_steps=1"),
    *("trainer.limit_val_batches=1", "trainer.val_check_interval=4", "data.batch_size=4", "model.warmup_steps=2"),
    *("name=test", "evals=[scenes_retrieval]", "scoring.images=4", "evals.scenes_retrieval.every=1"),
    *("+model.net.text_layers=1", "+model.net.decoder_layers=1", "model.net.dropout=0.2"),
)
MAP = ("data.train_count=24",)


class Die(L.Callback):
    """SIGKILL to its own process at the end of the batch that makes `batches` in all."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batches:
            os.kill(os.getpid(), signal.SIGKILL)


def train_here(folder: Path, overrides: tuple[str, ...], watch: L.Callback | None, environment: dict[str, str]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of workers, as usual; else they would start a fork server
    os.environ.update(environment)
    if "SUBMITIT_EXECUTOR" in environment:
        signal.signal(signal.SIGUSR2, _requeue_like_submitit)
    requeue_while_starting()  # the first thing that the command does
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = (folder.parent / f"{folder.name}.log").open("a", buffering=1)
    with watched(*[watch] if watch is not None else []):
        run(folder, *TINY, *overrides)


def _requeue_like_submitit(number: int, frame: Any) -> None:
    print("submitit was here")
    sys.exit(7)


def train(
    folder: Path, *overrides: str, watch: L.Callback | None = None, environment: dict[str, str] | None = None
) -> int:
    """Exit code of a run in a process of its own; what it says goes to FOLDER.log."""
    process = FORKSERVER.Process(target=train_here, args=(folder, overrides, watch, environment or {}))
    process.start()
    process.join(600)
    assert process.exitcode is not None
    return process.exitcode


TIMES = ("samples/s", "train/data_wait")  # are never the same


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(a: Path, b: Path) -> None:
    """Logs row by row, scores, and everything in the last checkpoint, bit by bit."""
    assert rows(a) == rows(b)
    assert results(a) == results(b)
    left, right = state(a), state(b)
    found = [{path.name: path.read_text() for path in folder.glob("checkpoints/best.json")} for folder in (a, b)]
    assert found[0] == found[1]
    assert left[RUN_KEY] == right[RUN_KEY]
    assert left["loops"] == right["loops"]
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0)
    assert left.get("current_model_state") is None or not torch.equal(
        left["current_model_state"]["net.logit_scale"], left["state_dict"]["net.logit_scale"]
    )
    torch.testing.assert_close(left.get("current_model_state"), right.get("current_model_state"), rtol=0, atol=0)


class Signal(L.Callback):
    """Sends signals to its own process during batch 2, on one rank."""

    def __init__(self, *numbers: int, rank: int = 0) -> None:
        self.numbers, self.rank = numbers, rank

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == 2 and trainer.global_rank == self.rank:
            for number in self.numbers:
                os.kill(os.getpid(), number)
