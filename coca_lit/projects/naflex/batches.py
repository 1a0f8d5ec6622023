"""Batches of images of any shape that hold about as many patches each."""

import random
from collections.abc import Sequence
from itertools import accumulate

from coca_lit.data.loader import Planned, Schedule
from coca_lit.distributed import stable_seed
from coca_lit.errors import DataError
from coca_lit.projects.naflex.inputs import AnyShape


class PatchSchedule(Schedule):
    """Batches that are filled by patches: a budget is drawn for each, which has `batch_size` images at the largest one,
    and k times as many where k times the budget is no larger. So all batches hold about equally many patches, and any
    number of processes that divides `batch_size` divides each of them.

    The budgets are drawn once, and each epoch has the same ones in another order; so all epochs are equally long.

    Args:
        samples: of an epoch, at most.
        budgets: of patches of an image.

    Raises:
        ValueError: a budget is below 1.
        DataError: there are too few samples for a batch.
    """

    input_kind = AnyShape

    def __init__(self, samples: int, batch_size: int, budgets: Sequence[int], seed: int) -> None:
        if not all(isinstance(budget, int) and budget > 0 for budget in budgets):
            raise ValueError(f"patches must be whole numbers of at least 1, got {list(budgets)}")
        self.batch_size = batch_size
        self.seed = seed
        self.samples = 0
        self._drawn: list[tuple[int, int]] = []  # (size, budget) of each batch of an epoch
        self._epoch: tuple[int, list[Planned]] = (-1, [])
        rng = random.Random(stable_seed("patches", seed))
        while True:
            budget = rng.choice(budgets)
            size = batch_size * _times(budgets, budget)
            if self.samples + size > samples:
                break
            self._drawn.append((size, budget))
            self.samples += size
        if not self._drawn:
            raise DataError(f"an epoch has {samples} samples, less than a batch of {size}: choose a smaller batch_size")

    @staticmethod
    def largest(batch_size: int, budgets: Sequence[int]) -> int:
        return batch_size * _times(budgets, min(budgets))

    def __len__(self) -> int:
        return len(self._drawn)

    def at(self, number: int) -> Planned:
        epoch, step = divmod(number, len(self))
        if self._epoch[0] != epoch:
            order = self._drawn.copy()
            random.Random(stable_seed("patches", self.seed, epoch)).shuffle(order)
            starts = accumulate((size for size, _ in order), initial=epoch * self.samples)
            planned = [Planned(first, size, budget) for first, (size, budget) in zip(starts, order, strict=False)]
            self._epoch = (epoch, planned)
        return self._epoch[1][step]


def _times(budgets: Sequence[int], budget: int) -> int:
    """How many images with this budget take the room of one with the largest."""
    return max(budgets) // budget
