"""An epoch of records as a training reads it."""

from itertools import islice

from hypothesis import strategies as st
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
    together: int = 1,
) -> list[list[Index]]:
    """What `ShuffledBatches` says of an epoch of records, in other words: one permutation is cut into batches."""
    groups = epoch_order(samples // together, seed, epoch).tolist()
    order = [together * group + i for group in groups for i in range(together)]
    batches = []
    for step in range(len(schedule)):
        first, size, budget = schedule.at(epoch * len(schedule) + step)
        first -= epoch * schedule.samples
        batches.append([Index(epoch, i, budget) for i in order[first : first + size]])
    return batches


def check_killed_runs(samples: int, schedule: Schedule, data: st.DataObject) -> None:
    """A run of three epochs that is killed at any batches and goes on with any number of ranks gets the batches of one
    that is not: each epoch is one permutation cut into batches.
    """
    seed, together = data.draw(st.integers(0, 9)), data.draw(st.sampled_from([1, 2, 4]))
    worlds = [n for n in range(1, schedule.batch_size + 1) if schedule.batch_size % n == 0]
    expected = [b for epoch in range(3) for b in epoch_batches(samples, schedule, seed, epoch, together=together)]
    while expected:
        start, world = 3 * len(schedule) - len(expected), data.draw(st.sampled_from(worlds))
        killed = data.draw(st.integers(1, len(expected)))
        for rank in range(world):
            more = {"rank": rank, "world": world, "together": together}
            batches = ShuffledBatches([Source("", samples)], schedule, seed, start, None, by_epoch=True, **more)
            assert [*islice(batches, killed)] == [batch[rank::world] for batch in expected[:killed]]
        expected = expected[killed:]
