"""What happens to a run from outside while it trains: workers that die, a full disk."""

import csv
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest

from coca_lit.callbacks import MetricsLog
from helpers.resuming import MAP, TINY, assert_same, state, train
from helpers.running import ROOT, results, run, watched

SHORT = (*TINY, *MAP, "trainer.max_epochs=1")


class SignalWorker(L.Callback):
    """A signal to a data worker in step 1."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            worker = multiprocessing.active_children()[0]
            print(f"worker {worker.pid}")
            os.kill(worker.pid, self.number)


@pytest.mark.slow
def test_killed_worker_is_one_sentence(tmp_path: Path) -> None:
    overrides = (*MAP, "data.num_workers=1", "data.batch_size=2")
    assert train(tmp_path / "run", *overrides, watch=SignalWorker(signal.SIGKILL)) == 1
    said = (tmp_path / "run.log").read_text()
    pid = re.search(r"worker (\d+)", said)[1]  # type: ignore[index]
    last = said.strip().splitlines()[-1]
    expected = rf"coca_lit\.errors\.DataError: a data worker( \(process {pid}\))? .*killed.*fewer workers.*resumes"
    assert re.fullmatch(expected, last)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A real disk of 96 MB, of which a checkpoint leaves 64 MB free."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


class FillDisk(L.Callback):
    """Fills a disk to the last byte after a step, and makes room after another one. Rows are long, because the last
    block of a file is its own on a full disk too.
    """

    def __init__(self, disk: Path, full: int, room: int | None = None) -> None:
        self.filler, self.full, self.room = disk / "filler", full, room

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        pl_module.log_dict({f"long/{i}": i + 1 / 3 for i in range(300)})
        if trainer.global_step == self.full:
            with self.filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(2**16))
                except OSError:
                    pass
        if trainer.global_step == self.room:
            self.filler.unlink()


def logged(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if name not in ("samples/s", "train/data_wait")}
            for row in csv.DictReader(file)
        ]


@pytest.mark.slow
def test_full_disk_costs_nothing_but_checkpoints(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Full from step 2 to 4, all rows are there at the end. Full from step 2 until the scores are to be written, all
    rows, scores and the report are, at the second try.
    """
    no_checkpoints = (*SHORT, "callbacks.checkpoint=null", "scoring.every_n_steps=2")
    with watched(FillDisk(tmp_path, full=0)):
        expected = run(tmp_path / "whole", *no_checkpoints)
    for name, room in (("some time", 4), ("to the end", None)):
        folder = small_disk / name.replace(" ", "_")
        fill = FillDisk(small_disk, 2, room)
        clock = SimpleNamespace(sleep=lambda _, fill=fill: fill.filler.unlink(), time=time.time)
        monkeypatch.setattr("coca_lit.runs.results.time", clock)
        with watched(fill), caplog.at_level(logging.WARNING):
            assert run(folder, *no_checkpoints) == expected
        assert caplog.text.count("metrics.csv: No space left on device; the run continues") == 1
        caplog.clear()
        assert logged(folder) == logged(tmp_path / "whole")
        assert results(folder) == expected
        assert (folder / "report.html").exists()
        shutil.rmtree(folder)


class RoomAndKill(FillDisk):
    """Makes room as soon as the row of the step could not be written, and kills the process after the checkpoint that
    can be written then.
    """

    def setup(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        trainer.callbacks.insert(1, trainer.callbacks.pop())  # checkpoints come first, and other rows after this one
        log_metrics = MetricsLog.log_metrics

        def log_and_make_room(log: MetricsLog, metrics: dict[str, float], step: int | None = None) -> None:
            log_metrics(log, metrics, step)
            if "long/0" in metrics:
                self.filler.unlink(missing_ok=True)

        MetricsLog.log_metrics = log_and_make_room

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.full:
            os.kill(os.getpid(), signal.SIGKILL)


def test_rows_that_wait_are_written_before_a_checkpoint(tmp_path: Path, small_disk: Path) -> None:
    """A run that resumes from it makes no rows of earlier steps."""
    short = (*MAP, "trainer.limit_val_batches=0", "callbacks.checkpoint.every_n_steps=1")
    assert train(small_disk, *short, watch=RoomAndKill(small_disk, full=2)) == -signal.SIGKILL
    assert "metrics.csv: No space left on device; the run continues" in (tmp_path / "disk.log").read_text()
    assert state(small_disk)["global_step"] == 2
    assert [int(row["step"]) for row in logged(small_disk) if row["train/caption_loss"]] == [0, 1]


HIDDEN = """
import os, runpy, signal, sys, types
sys.modules["fcntl"] = None
from lightning.pytorch.trainer.connectors import signal_connector
signal_connector.signal = types.ModuleType("signal")  # what it does without them depends on the platform
vars(signal_connector.signal).update(vars(signal))
for name in ("SIGUSR1", "SIGUSR2", "SIGALRM"):
    delattr(signal, name)
def refuse(*_, **__):
    raise OSError(1314, "A required privilege is not held by the client")
os.symlink = refuse
import lightning.pytorch as L, coca_lit.cli.train, coca_lit.lit_module, coca_lit.callbacks, coca_lit.tools.report
class Die(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
def build_and_die(*args):
    trainer = build(*args)
    trainer.callbacks.append(Die())
    return trainer
build = coca_lit.cli.train.build_trainer
for name, dies in (("whole", False), ("killed", True), ("killed", False)):
    if (child := os.fork()) == 0:
        coca_lit.cli.train.build_trainer = build_and_die if dies else build
        sys.argv = [*sys.argv[1:], f"name={name}"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        os._exit(0)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_trains_and_resumes_without_what_windows_lacks(tmp_path: Path) -> None:
    """No fcntl, no user signals, no symbolic links: the same bits after a kill."""
    (tmp_path / "hidden.py").write_text(HIDDEN)
    command = [sys.executable, str(tmp_path / "hidden.py"), str(ROOT / "train.py")]
    words = (*SHORT, "callbacks.checkpoint.every_n_steps=3", "trainer.limit_val_batches=0")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    ends = [line for line in done.stdout.splitlines() if line.startswith("ended")]
    assert ends == ["ended 0", "ended -9", "ended 0"], done.stderr
    assert "resuming after step 3 in epoch 1" in done.stdout
    whole, killed = (tmp_path / "outputs" / name for name in ("whole", "killed"))
    assert_same(whole, killed)
    assert not (killed / "checkpoints" / "last.ckpt").is_symlink()
    assert not (killed / ".lock").exists()
