"""Training that makes no progress, or whose folder disappears: what is reported, and when."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from coca_lit.callbacks import StallGuard
from coca_lit.callbacks.guards import NonFiniteGuard, RunFolderGuard
from coca_lit.data.batch import Batch
from helpers.datamodules import Recorder

pytestmark = pytest.mark.filterwarnings("ignore:You defined a .validation_step")  # of the recorder


class Slow(Dataset[Batch]):
    """Four batches, each loaded by `load(its number)`."""

    def __init__(self, load: Callable[[int], None]) -> None:
        self.load = load

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Batch:
        self.load(i)
        return Batch(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2), torch.ones(1), [f"sample {i}"])


def fit(load: Callable[[int], None]) -> None:
    """Half a second without a batch is a stall."""
    options: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[StallGuard(minutes=0.5 / 60)], **options)
    trainer.fit(Recorder(), DataLoader(Slow(load), batch_size=None))


@pytest.mark.parametrize("stalls", [False, True])
def test_a_wait_for_data_is_reported_once_with_its_place(
    stalls: bool, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading alone moves the clock: by 0.4 s a batch, or by an hour for the third, where 0.5 s are too long."""
    now, looks = [0.0], [0]

    def look() -> float:
        looks[0] += 1
        return now[0]

    def load(i: int) -> None:
        now[0] += 3600 if stalls and i == 2 else 0.4
        seen, end = looks[0], time.monotonic() + 60
        while looks[0] < seen + 3 and time.monotonic() < end:  # the guard looks again and again
            time.sleep(0.01)

    monkeypatch.setattr("coca_lit.callbacks.guards.time", SimpleNamespace(monotonic=look))
    fit(load)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("coca_lit")]
    assert len(ours) == stalls
    said = capfd.readouterr().err
    if stalls:
        assert "after step 2; its last samples: sample 1" in ours[0]
        assert "in __getitem__" in said
    else:
        assert "__getitem__" not in said


def test_a_run_goes_on_where_its_folder_cannot_be_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0")
    guard, trainer = RunFolderGuard(folder), L.Trainer(logger=False, enable_checkpointing=False)
    guard.on_train_start(trainer, Recorder())
    caplog.clear()
    shutil.rmtree(folder)
    folder.write_text("a file has its name now")
    guard.on_fit_end(trainer, Recorder())
    assert len(caplog.records) == 2, caplog.text  # that it was deleted, and why it cannot be made again
    assert str(folder) in caplog.messages[1]


def test_the_watch_ends_with_a_training_that_fails() -> None:
    def load(i: int) -> None:
        raise OSError("the disk is gone")

    before = threading.active_count()
    with pytest.raises(OSError, match="the disk is gone"):
        fit(load)
    until = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert "stalls" not in [thread.name for thread in threading.enumerate()]


def test_a_negative_spike_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^spike must be a number of at least 0, got -1$"):
        NonFiniteGuard(tmp_path, spike=-1)


def test_batch_norms_forget_a_batch_whose_step_the_loss_scaler_skips(tmp_path: Path) -> None:
    scaler: Any = SimpleNamespace(scale=lambda ones: 1024 * ones)
    plugin = SimpleNamespace(scaler=scaler)
    trainer: Any = SimpleNamespace(
        precision="16-mixed", precision_plugin=plugin, accumulate_grad_batches=1, global_step=0
    )
    guard, net, module = NonFiniteGuard(tmp_path), torch.nn.BatchNorm1d(2), L.LightningModule()
    module.net = net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for number in (1.0, float("inf")):
        batch = Batch(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2), torch.ones(1), ["sample"])
        guard.on_train_batch_start(trainer, module, batch, 0)
        before = net.running_mean.clone()
        loss = 1024 * net(torch.tensor([[number, 1.0], [2.0, 3.0]])).square().mean()
        guard.on_before_backward(trainer, module, loss)
        guard.on_before_optimizer_step(trainer, module, optimizer)
    assert torch.equal(net.running_mean, before)
    assert before.abs().sum() > 0
