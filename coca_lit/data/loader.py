"""Training loaders that resume at the exact batch.

The position (epoch, batches done) is not stored twice: it is read from the trainer's counters, which every checkpoint
holds. Batch sizes are global, so the order of a data set depends on the seed and not on the number of ranks.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from coca_lit.data.batch import Batch, collate
from coca_lit.data.examples import FirstCaptionDataset, Index, TrainingExamples
from coca_lit.data.prefetch import ahead_of, worker_options
from coca_lit.distributed import stable_seed
from coca_lit.errors import DataError


class TrainLoader:
    """`steps` batches per epoch, starting at the trainer's `position`.

    Args:
        steps: batches of a complete epoch.
        batches_from: (epoch, batches done) -> the batches from there on, at least to the end of the epoch.
        position: () -> (epoch, batches done).
        endless: `batches_from` goes on with the next epochs, so that its workers live on and are ahead when one begins.

    Attributes:
        waited: seconds for which the caller waited for the newest batch.
        device: where the batches are wanted. A GPU gets each one while it computes the one before.
    """

    waited = 0.0
    device = torch.device("cpu")

    def __init__(
        self,
        steps: int,
        batches_from: Callable[[int, int], Iterable[Batch]],
        position: Callable[[], tuple[int, int]],
        endless: bool = False,
    ):
        self.steps, self.batches_from, self.position, self.endless = steps, batches_from, position, endless
        self.close()

    def close(self) -> None:
        """Ends the workers."""
        self._batches: Iterator[Batch] = iter(())
        self._next: tuple[int, int] | None = None  # position of the next batch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so that this runs at the first next(): at iter() the trainer has not restored its counters yet.
        asked_at = time.monotonic()
        epoch, done = self.position()
        if self._next != (epoch, done):
            batches = self.batches_from(epoch, done)
            self._batches = ahead_of(batches if self.endless else islice(batches, self.steps - done), self.device)
        for step in range(done, self.steps):
            batch = next(self._batches)
            self.waited = time.monotonic() - asked_at
            self._next = (epoch, step + 1) if step + 1 < self.steps else (epoch + 1, 0) if self.endless else None
            yield batch
            asked_at = time.monotonic()

    # Their presence tells Lightning that the loader is resumable. There is nothing to store, see above.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def per_rank(batch_size: int, world: int) -> int:
    """A rank's part of the global batch; raises `DataError` if it cannot be split evenly."""
    if batch_size < 1 or batch_size % world:
        raise DataError(
            f"the global batch_size {batch_size} cannot be split evenly over {world} processes: "
            f"choose a positive multiple of {world}"
        )
    return batch_size // world


class Planned(NamedTuple):
    """A global batch."""

    first: int  # samples of all batches before it
    size: int
    patches: int | None = None  # the budget of each image, if one was drawn for the batch


class Schedule:
    """The sizes of all batches, here `batch_size` samples each.

    Args:
        samples: of an epoch, at most.
    """

    def __init__(self, samples: int, batch_size: int) -> None:
        self.batch_size = batch_size
        self.samples = samples - samples % batch_size  # of an epoch

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.samples // self.batch_size

    def at(self, number: int) -> Planned:
        """Batch `number`, counted over all epochs."""
        return Planned(number * self.batch_size, self.batch_size)


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
    """A rank's batches of indices below `samples` from batch `start` on.

    One seeded permutation is cut into global batches, each of which is split over the ranks, so global batch k holds
    the same samples for every world size. An incomplete last batch is dropped. As many samples as `together` says, by
    which `samples` can be divided, keep following each other.
    """
    per_rank(schedule.batch_size, world)
    groups = epoch_order(samples // together, seed, epoch).tolist()
    order = [together * group + i for group in groups for i in range(together)]
    batches = []
    for step in range(start, len(schedule)):
        first, size, patches = schedule.at(epoch * len(schedule) + step)
        first -= epoch * schedule.samples
        batches.append([Index(epoch, i, patches) for i in order[first + rank : first + size : world]])
    return batches


def epoch_order(count: int, seed: int, epoch: int, *of: str) -> Tensor:
    """The permutation (count,) of an epoch; `of` names one of several data sets."""
    generator = torch.Generator().manual_seed(stable_seed("order", seed, epoch, *of))
    return torch.randperm(count, generator=generator)


def training_loader(
    examples: TrainingExamples, batches: Iterable[list[Index]], pad_id: int, num_workers: int
) -> DataLoader[Batch]:
    """The DataLoader of these batches of indices."""
    return DataLoader(
        examples,  # type: ignore[arg-type]  # of examples, which are collated to batches
        batch_sampler=batches,
        collate_fn=partial(collate, pad_id=pad_id),
        **worker_options(num_workers),
    )


def validation_loader(
    dataset: FirstCaptionDataset, batch_size: int, rank: int = 0, world: int = 1, num_workers: int = 0
) -> DataLoader:
    """This rank's fixed batches, every `world`-th sample; `batch_size` is global.

    All batches are full, because a contrastive loss depends on the number of candidates, and every rank has the same
    number of them: the remainder is dropped, nothing repeats. A set smaller than one batch becomes one smaller batch.
    """
    if len(dataset) < world:
        raise DataError(f"validation needs at least one image per process: there are {len(dataset)} for {world}")
    return DataLoader(
        dataset,
        batch_size=min(per_rank(batch_size, world), len(dataset) // world),
        # Lightning would replace any other sampler with one that repeats samples.
        sampler=DistributedSampler(dataset, world, rank, shuffle=False, drop_last=True),
        drop_last=True,
        collate_fn=partial(collate, pad_id=dataset.tokenizer.pad_id),
        **worker_options(num_workers),
    )
