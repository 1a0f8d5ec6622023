"""An epoch of records as a training reads it."""

from collections.abc import Sequence

from torch.utils.data import DataLoader

from coca_lit.data.any_shape import PatchSchedule
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
    budgets: Sequence[int] = (),
    endless: bool = False,
) -> DataLoader[Batch]:
    """This rank's batches from batch `start` of an epoch on, and if `endless` those of all later ones."""
    size = len(dataset)
    schedule = PatchSchedule(size, batch_size, budgets, dataset.seed) if budgets else Schedule(size, batch_size)
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
        first, size, patches = schedule.at(epoch * len(schedule) + step)
        first -= epoch * schedule.samples
        batches.append([Index(epoch, i, patches) for i in order[first + rank : first + size : world]])
    return batches
