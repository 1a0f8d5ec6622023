"""Whole runs on Lightning's CUDA accelerator, whose GPU is simulated."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from simulated_gpu import Recorder, SimulatedGpu
from subjects import TINY

from helpers.running import run

GPU = ("trainer.accelerator=gpu", "trainer.devices=1")


def on_gpu(folder: Path, *overrides: str) -> dict[str, float]:
    with SimulatedGpu():
        return run(folder, *TINY, *GPU, *overrides)


def recorded_steps(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Gets what happens in each step of a training, its callbacks and the arrival of its batch included."""
    found: list[Recorder] = []
    advance = _TrainingEpochLoop.advance

    def recorded(loop: Any, *arguments: Any) -> None:
        with Recorder() as recorder:
            advance(loop, *arguments)
        found.append(recorder)

    monkeypatch.setattr(_TrainingEpochLoop, "advance", recorded)
    return found
