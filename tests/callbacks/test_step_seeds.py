"""Random numbers by step: other ones in every batch, epoch and rank, and the same ones when the step is made again."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import torch

from coca_lit.callbacks import StepSeeds


def drawn(seed: int, epoch: int, batch: int, rank: int) -> float:
    trainer: Any = SimpleNamespace(current_epoch=epoch, global_rank=rank)
    nothing: Any = None
    StepSeeds(seed).on_train_batch_start(trainer, nothing, nothing, batch)
    return torch.rand(()).item()


def test_each_step_has_random_numbers_of_its_own() -> None:
    steps = [*product(range(2), repeat=4)]
    found = [drawn(*step) for step in steps]
    assert len(set(found)) == len(steps)
    assert [drawn(*step) for step in reversed(steps)] == found[::-1]
