"""An epoch of records as a training reads it."""

from collections.abc import Iterator, Sequence
from itertools import count

from torch.utils.data import DataLoader

from coca_lit.data.any_shape import PatchSchedule
from coca_lit.data.batch import Batch
from coca_lit.data.examples import CaptionDataset, Index
from coca_lit.data.loader import Schedule, epoch_batches, training_loader


def open_epoch(
    dataset: CaptionDataset,
    batch_size: int,
    epoch: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    budgets: Sequence[int] = (),
    endless: bool = False,
) -> DataLoader[Batch]:
    """This rank's batches from batch `start` of an epoch on, and if `endless` those of all later ones."""
    size = len(dataset)
    schedule = PatchSchedule(size, batch_size, budgets, dataset.seed) if budgets else Schedule(size, batch_size)

    def batches() -> Iterator[list[Index]]:
        for number in count(epoch) if endless else [epoch]:
            yield from epoch_batches(size, schedule, dataset.seed, number, start if number == epoch else 0, rank, world)

    return training_loader(dataset, batches(), dataset.tokenizer.pad_id, num_workers)
