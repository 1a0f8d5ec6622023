"""The share of the time for which training waits for data, on a clock that loader and step move."""

import re
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from rich.console import Console
from torch import Tensor

from coca_lit.callbacks import Throughput
from coca_lit.callbacks.progress import PlainProgress, SamplesSeen, TerminalProgress, not_timed
from coca_lit.data.batch import Batch
from coca_lit.data.loader import TrainLoader
from helpers.datamodules import Recorder

pytestmark = pytest.mark.filterwarnings("ignore:You defined a .validation_step")  # of the recorder


class Clock:
    """The real one, with hours added to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hours, real = 0.0, time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: real() + 3600 * self.hours)


class Module(Recorder):
    def __init__(self, clock: Clock, hours: float) -> None:
        super().__init__()
        self.clock, self.hours = clock, hours

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.clock.hours += self.hours
        return super().training_step(batch, batch_idx)


class Pause(L.Callback):
    """`hours` between two epochs."""

    def __init__(self, clock: Clock, hours: float) -> None:
        self.clock, self.hours = clock, hours

    def on_train_epoch_end(self, *_: Any) -> None:
        self.clock.hours += self.hours


class Scores(L.Callback):
    """Scores within an epoch that take `hours`."""

    def __init__(self, clock: Clock, hours: float) -> None:
        self.clock, self.hours = clock, hours

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % 2 == 1:
            with not_timed(trainer):
                self.clock.hours += self.hours


def train(
    folder: Path,
    clock: Clock,
    loading: float,
    computing: float,
    accumulated: int = 1,
    scoring: float = 0,
    pause: float = 0,
) -> list[float]:
    """The shares that two epochs of four batches log, at every second step. Loading and computing a batch take
    `loading` and `computing` hours.
    """

    def batches(epoch: int, start: int) -> Iterator[Batch]:
        for step in range(start, 4):
            clock.hours += 50 if epoch == step == 0 else loading  # workers start
            yield Batch(torch.zeros(8, 3, 2, 2), torch.zeros(8, 2), torch.ones(8), [str(step)] * 8)

    shares = []

    class Log(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step % 2 == 0 and "train/data_wait" in trainer.callback_metrics:
                shares.append(trainer.callback_metrics["train/data_wait"].item())

    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=2,
        log_every_n_steps=2,
        accumulate_grad_batches=accumulated,
        callbacks=[Scores(clock, scoring), Pause(clock, pause), Throughput(), Log(), PlainProgress()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader = TrainLoader(4, batches, lambda: (trainer.current_epoch, 0))
    trainer.fit(Module(clock, computing), loader)
    return shares


class Hours:
    """Progress on a clock of its own: each step ends when `hours` more have passed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, every: int, bar: PlainProgress | None = None) -> None:
        self.now, self.bar = 0.0, bar or PlainProgress()
        self.trainer: Any = SimpleNamespace(
            global_step=0,
            estimated_stepping_batches=100,
            is_global_zero=True,
            log_every_n_steps=every,
            current_epoch=0,
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_should_accumulate=lambda: False)),
        )
        monkeypatch.setattr(time, "monotonic", lambda: 3600 * self.now)
        monkeypatch.setattr(PlainProgress, "get_metrics", lambda *_: {})
        self.bar.on_train_start(self.trainer, None)  # type: ignore[arg-type]

    def steps(self, count: int, hours: float) -> None:
        for _ in range(count):
            self.now += hours
            self.trainer.global_step += 1
            self.bar.on_train_batch_end(self.trainer, None, None, None, 0)  # type: ignore[arg-type]


def test_the_time_left_follows_the_last_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the first step nor what was slow long ago counts."""

    hours = Hours(monkeypatch, every=2)
    hours.steps(1, 20)
    hours.steps(1, 0.01)
    said = capsys.readouterr().out
    assert "step 2/100 · epoch 1 · ETA 0:58:48" in said  # 98 steps of 36 seconds
    hours.steps(10, 0.5)
    hours.steps(10, 0.1)
    assert "step 22/100 · epoch 1 · ETA 7:48:00" in capsys.readouterr().out  # 78 steps of 6 minutes


def test_the_time_left_where_every_step_is_logged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hours = Hours(monkeypatch, every=1)
    hours.steps(1, 1)
    hours.steps(1, 0.1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("ETA 4 days, 3:00:00")  # nothing else is known
    assert lines[1].endswith("ETA 9:48:00")


def test_a_terminal_has_one_line_with_the_time_left_of_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """80 columns wide; other bars have it to themselves meanwhile."""
    bar = TerminalProgress(Console(force_terminal=True, width=80, color_system=None))
    hours = Hours(monkeypatch, every=2, bar=bar)
    losses = {f"train/{name}_loss": 1.23456 for name in ("contrastive", "caption", "a", "b", "c", "d")}
    monkeypatch.setattr(PlainProgress, "get_metrics", lambda *_: {"v_num": 1, "val/x_loss": 2.0, **losses})
    hours.steps(2, 0.25)
    bar._bar.refresh()
    with bar.hidden():
        assert not bar._bar.live.is_started
    hours.steps(1, 0.25)
    bar.on_train_end(hours.trainer, None)  # type: ignore[arg-type]
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    lines = [line for line in re.split(r"[\r\n]+", said) if line.strip()]
    assert max(map(len, lines)) <= 80
    second = next(line for line in lines if line.startswith("2/100"))
    assert "1 day, 0:30:00 left contrastive 1.23  caption 1.23" in second
    assert "  d " not in second
    assert lines[-1].startswith("3/100")
    assert "step" not in said


def test_the_share_of_the_wait_is_logged_and_leads_to_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = train(tmp_path, Clock(monkeypatch), 1, 3)
    # The first two hours of six are in an interval with the 50 for which workers started, which are no wait.
    assert shares == pytest.approx([1 / 57, 1 / 4, 1 / 4, 1 / 4], rel=0.01)
    assert "training waited for data 23% of the time" in capsys.readouterr().out  # 7 of 31 hours
    assert train(tmp_path, Clock(monkeypatch), 1, 30)[-1] == pytest.approx(1 / 31, rel=0.01)
    assert "waited" not in capsys.readouterr().out


def test_accumulated_batches_are_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, Clock(monkeypatch), 1, 3, accumulated=2)
    said = capsys.readouterr().out
    assert [line.split(" · ")[0] for line in said.splitlines() if line.startswith("step")] == ["step 2/4", "step 4/4"]
    # 32 samples in an interval; the workers start in the first, see above.
    assert speeds(said) == pytest.approx([32 / (65 * 3600), 32 / (16 * 3600)], rel=0.01)


def speeds(said: str) -> list[float]:
    """The samples per second of all lines of progress."""
    return [float(line.rpartition("samples/s ")[2]) for line in said.splitlines() if line.startswith("step")]


def test_what_lies_between_epochs_is_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither are scores."""
    shares = train(tmp_path, Clock(monkeypatch), 1, 3, scoring=100, pause=1000)
    assert shares == pytest.approx([1 / 57, 1 / 4, 1 / 4, 1 / 4], rel=0.01)
    # 16 samples in an interval; the workers start in the first.
    assert speeds(capsys.readouterr().out) == pytest.approx([16 / (h * 3600) for h in (57, 8, 8, 8)], rel=0.01)


def printed(folder: Path) -> str:
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as said:
        train(folder, Clock(patch), 1, 3)
    return said.getvalue()


@pytest.mark.slow
def test_samples_of_all_ranks_count(on_ranks: Any, tmp_path: Path) -> None:
    """Two processes train on 16 samples each in an interval of 8 hours."""
    assert speeds(on_ranks(2, printed, tmp_path)[0])[1:] == pytest.approx([32 / (8 * 3600)] * 3, rel=0.01)


def test_a_wait_behind_which_a_gpu_computes_is_none() -> None:
    throughput, loader = Throughput(), TrainLoader(1, lambda *_: [], lambda: (0, 0))
    trainer: Any = SimpleNamespace(train_dataloader=loader)
    for waited, is_done in ((9.0, True), (1.0, True), (2.0, False), (4.0, True)):
        loader.waited = waited
        throughput._computed = SimpleNamespace(query=lambda is_done=is_done: is_done)  # type: ignore[assignment]
        throughput.on_train_batch_start(trainer, None, None, 0)  # type: ignore[arg-type]
    assert throughput._waited == 5.0


@pytest.mark.parametrize(("images", "samples"), [(4, 4), (8, 4), (0, 0)])
def test_a_sample_counts_once_however_many_images_it_has(images: int, samples: int) -> None:
    batch = Batch(torch.zeros(images, 3, 2, 2), torch.zeros(4, 2), torch.full((4,), 2), list("abcd"))
    nothing: Any = None
    seen, speed = SamplesSeen(), Throughput()
    trainer: Any = SimpleNamespace(log_every_n_steps=0, global_step=1)
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    for callback in (seen, speed):
        callback.on_train_batch_end(trainer, module, nothing, batch, 0)
    assert seen.total() == {"samples": samples, "tokens": 8}
    assert speed._samples == samples
