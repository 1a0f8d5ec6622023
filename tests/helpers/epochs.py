"""An epoch of records as a training reads it."""

from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from coca_lit.data.batch import Batch
from coca_lit.data.examples import CaptionDataset, Index
from coca_lit.data.loader import Schedule, ShuffledBatches, epoch_order, training_loader
from coca_lit.data.mixture import Source


def open_epoch(
    dataset: CaptionDataset,
    batch_size: int,
    epoch: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    schedule: Schedule | None = None,
    endless: bool = False,
) -> DataLoader[Batch]:
    """This rank's batches from batch `start` of an epoch on, and if `endless` those of all later ones."""
    size = len(dataset)
    schedule = schedule or Schedule(size, batch_size)
    begin, end = epoch * len(schedule) + start, None if endless else (epoch + 1) * len(schedule)
    order = ShuffledBatches([Source("", size)], schedule, dataset.seed, begin, end, rank, world, by_epoch=True)
    return training_loader(dataset, order, dataset.tokenizer.pad_id, num_workers)


def epoch_batches(
    samples: int,
    schedule: Schedule,
    seed: int,
    epoch: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    together: int = 1,
) -> list[list[Index]]:
    """What `ShuffledBatches` says of an epoch of records, in other words: one permutation is cut into batches."""
    groups = epoch_order(samples // together, seed, epoch).tolist()
    order = [together * group + i for group in groups for i in range(together)]
    batches = []
    for step in range(start, len(schedule)):
        first, size, budget = schedule.at(epoch * len(schedule) + step)
        first -= epoch * schedule.samples
        batches.append([Index(epoch, i, budget) for i in order[first + rank : first + size : world]])
    return batches


def of_epoch(samples: int, schedule: Schedule, seed: int, epoch: int, **more: Any) -> list[list[Index]]:
    """What `ShuffledBatches` says of an epoch of records."""
    start, stop = epoch * len(schedule), (epoch + 1) * len(schedule)
    return list(ShuffledBatches([Source("", samples)], schedule, seed, start, stop, by_epoch=True, **more))


def check_order_of_epochs(samples: int, schedule: Schedule, together: int) -> None:
    """Each epoch is one permutation cut into batches, on any number of ranks; endless batches go on with the next."""
    for epoch in (0, 1, 7):
        expected = epoch_batches(samples, schedule, 3, epoch, together=together)
        assert of_epoch(samples, schedule, 3, epoch, together=together) == expected
        halves = [epoch_batches(samples, schedule, 3, epoch, rank=rank, world=2) for rank in range(2)]
        assert [of_epoch(samples, schedule, 3, epoch, rank=rank, world=2) for rank in range(2)] == halves
    start = 2 * len(schedule) + 3
    endless = [*epoch_batches(samples, schedule, 3, 2, 3), *epoch_batches(samples, schedule, 3, 3)]
    batches = ShuffledBatches([Source("", samples)], schedule, 3, start, None, by_epoch=True)
    assert list(islice(batches, len(endless))) == endless
