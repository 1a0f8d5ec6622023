"""Training loaders that resume at the exact batch.

The position (epoch, batches done) is not stored twice: it is read from the trainer's counters, which every checkpoint
holds. Batch sizes are global, so the order of a data set depends on the seed and not on the number of ranks.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count, islice
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from coca_lit.data.batch import Batch, collate
from coca_lit.data.examples import FirstCaptionDataset, Index, TrainingExamples
from coca_lit.data.mixture import Source, counts_after, weighted_round_robin
from coca_lit.data.prefetch import ahead_of, worker_options
from coca_lit.distributed import stable_seed
from coca_lit.errors import DataError
from coca_lit.models.inputs import InputKind


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
        self.steps = steps
        self.batches_from = batches_from
        self.position = position
        self.endless = endless
        self._batches: Iterator[Batch] = iter(())
        self._next: tuple[int, int] | None = None  # position of the next batch

    def close(self) -> None:
        """Ends the workers, which live as long as the iterator over their batches."""
        self._batches = iter(())
        self._next = None

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
            self._next = (epoch, step + 1)
            if step + 1 == self.steps:
                self._next = (epoch + 1, 0) if self.endless else None
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
    budget: int | None = None  # for each image, if one was drawn for the batch


class Schedule:
    """The sizes of all batches, here `batch_size` samples each.

    A project declares another one in the table `batch_sizes` of its `project.toml`; its name is a key of data modules.

    Args:
        samples: of an epoch, at most.
        value: of that key.
        seed: of what is drawn.

    Attributes:
        input_kind: for which it draws a budget for each batch; None if it draws none.
    """

    input_kind: ClassVar[type[InputKind] | None] = None

    def __init__(self, samples: int, batch_size: int, value: Any = None, seed: int = 0) -> None:
        self.batch_size = batch_size
        self.samples = samples - samples % batch_size  # of an epoch

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.samples // self.batch_size

    def at(self, number: int) -> Planned:
        """Batch `number`, counted over all epochs."""
        return Planned(number * self.batch_size, self.batch_size)

    @staticmethod
    def largest(batch_size: int, value: Any) -> int:
        """Samples of the largest batch."""
        return batch_size


@dataclass(eq=False)
class ShuffledBatches:
    """A rank's batches of indices, from global batch `start` to `stop` of a schedule, counted over all epochs; without
    end if `stop` is None.

    Each source is read in passes, each in an order of its own that depends on the seed alone, not on the number of
    processes and workers; epochs are cut from the passes one after the other, whatever their length.
    """

    sources: Sequence[Source]  # whose samples follow each other in the data set
    schedule: Schedule
    seed: int
    start: int
    stop: int | None
    rank: int = 0
    world: int = 1
    together: int = 1  # samples that keep following each other; it divides the number of samples
    by_epoch: bool = False  # each epoch of the schedule is a pass over the only source

    def __post_init__(self) -> None:
        per_rank(self.schedule.batch_size, self.world)
        self.weights = [source.weight for source in self.sources]
        self.starts = [0, *accumulate(source.samples for source in self.sources)]  # of each source
        self._per_pass = [source.samples for source in self.sources]  # that are read
        if self.by_epoch:
            self._per_pass = [self.schedule.samples]
        elif len(self.sources) == 1 and self._per_pass[0] >= self.schedule.batch_size:
            self._per_pass[0] -= self._per_pass[0] % self.schedule.batch_size  # only whole batches, as by epochs
        # Of each source: its current pass and the order of that, in NumPy, whose items take a tenth of the time.
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def __iter__(self) -> Iterator[list[Index]]:
        return map(self.part, self.numbers())

    def numbers(self) -> Iterable[int]:
        """Of the global batches."""
        return count(self.start) if self.stop is None else range(self.start, self.stop)

    def part(self, number: int) -> list[Index]:
        """This rank's samples in a global batch, computed without the batches before it."""
        first, size, budget = self.schedule.at(number)
        order: Iterable[tuple[int, int]]
        if len(self.sources) == 1:  # a global batch of many processes takes time to go through
            order = ((0, k) for k in range(first + self.rank, first + size, self.world))
        else:
            turns = weighted_round_robin(self.weights, counts_after(first, self.weights))
            order = islice(turns, self.rank, size, self.world)
        samples: list[Index] = []
        for source, k in order:
            turn, place = divmod(k, self._per_pass[source])
            group, within = divmod(place, self.together)
            i = self.starts[source] + self.together * self._group(source, turn, group) + within
            samples.append(Index(turn, i, budget))
        return samples

    def _group(self, source: int, turn: int, place: int) -> int:
        """Which group of samples that stay together has this place in a pass."""
        known = self._orders.get(source)
        if known is None or known[0] != turn:
            self._orders.pop(source, None)  # makes room for the next
            samples = self.sources[source].samples
            name = self.sources[source].name
            order = epoch_order(samples // self.together, self.seed, turn, *filter(None, [name]))
            self._orders[source] = turn, order.numpy()
        return int(self._orders[source][1][place])


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
