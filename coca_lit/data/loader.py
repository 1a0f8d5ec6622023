"""Training loaders that resume at the exact batch.

The position (epoch, batches done) is not stored twice: it is read from the trainer's counters, which every checkpoint
holds. Batch sizes are global, so the order of a data set depends on the seed and not on the number of ranks.

An index of an example is (epoch, i), or (epoch, i, patches) where a budget of patches was drawn for the images of each
batch.
"""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import accumulate, islice
from itertools import count as count_from
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from coca_lit.data.batch import Batch, collate
from coca_lit.data.examples import CaptionDataset, FirstCaptionDataset, TrainingExamples
from coca_lit.errors import DataError
from coca_lit.models.patches import Patches
from coca_lit.seeding import stable_seed


class TrainLoader:
    """`steps` batches per epoch, starting at the trainer's `position`.

    Args:
        steps: batches of a complete epoch.
        open_at: (epoch, batches done) -> the batches from there on, at least to the end of the epoch.
        position: () -> (epoch, batches done).
        endless: `open_at` goes on with the next epochs, so that its workers live on and are ahead when one begins.

    Attributes:
        waited: seconds for which the caller waited for the newest batch.
        device: where the batches are wanted. A GPU gets each one while it computes the one before.
    """

    waited = 0.0
    device = torch.device("cpu")

    def __init__(
        self,
        steps: int,
        open_at: Callable[[int, int], Iterable[Batch]],
        position: Callable[[], tuple[int, int]],
        endless: bool = False,
    ):
        self.steps, self.open_at, self.position, self.endless = steps, open_at, position, endless
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
            batches = self.open_at(epoch, done)
            self._batches = _ahead(batches if self.endless else islice(batches, self.steps - done), self.device)
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


def _ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches; for a GPU each is copied on a second stream while the one before it is computed."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    coming: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            sent, arrival = batch.to(device), torch.cuda.Event()
            arrival.record(stream)
        if coming is not None:
            yield _arrived(*coming)
        coming = sent, arrival
    if coming is not None:
        yield _arrived(*coming)


def _arrived(batch: Batch, arrival: torch.cuda.Event) -> Batch:
    here = torch.cuda.current_stream()
    here.wait_event(arrival)
    for x in (batch.images.rows if isinstance(batch.images, Patches) else batch.images, batch.tokens):
        x.record_stream(here)  # its memory is not for the other stream before this one is done with it
    return batch


def ignore_signals(worker: int) -> None:
    """For DataLoader workers: a scheduler signals every process of a job, but training needs its workers until it has
    saved. They end with the training process, see `_end_workers`.
    """
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
        if number := getattr(signal, name, None):  # Windows lacks some
            signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """When a process exits, perhaps by an error, multiprocessing sends SIGTERM to its workers and waits for them:
    forever, as they ignore signals.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report their end as a failure
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


@cache
def _end_workers_with(process_id: int) -> None:
    Finalize(None, _end_workers, exitpriority=0)  # before multiprocessing's own; forked processes do not inherit it


def loading(num_workers: int) -> dict[str, Any]:
    """The arguments that all DataLoaders share. Each worker prepares two batches ahead (torch's default); with a GPU
    they are put into pinned memory, so that the copy to the device overlaps with the computation.
    """
    if num_workers:
        _end_workers_with(os.getpid())
    return {
        "num_workers": num_workers,
        "worker_init_fn": ignore_signals,
        "pin_memory": torch.cuda.is_available(),
    }


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
    patches: tuple[int, ...] = ()  # the budget of its images, if they become patches of a drawn one


class Schedule:
    """The sizes of all batches: `batch_size` samples each, or filled by patches. Then a budget is drawn for each batch,
    which has `batch_size` images at the largest one, and k times as many where k times the budget is no larger. All
    batches so hold about as many patches, and can be split over as many processes.

    The budgets are drawn once, and each epoch has the same ones in another order; so all epochs are equally long.

    Args:
        samples: of an epoch, at most.
        patches: budgets; none for batches of one size.

    Raises:
        ValueError: a budget is below 1.
    """

    def __init__(self, samples: int, batch_size: int, patches: Sequence[int] = (), seed: int = 0) -> None:
        self.batch_size, self.seed = batch_size, seed
        self.samples = samples - samples % batch_size  # of an epoch
        self._drawn: list[tuple[int, int]] = []  # (size, budget) of each batch of an epoch
        self._epoch: tuple[int, list[Planned]] = (-1, [])
        if not patches:
            return
        if not all(isinstance(budget, int) and budget > 0 for budget in patches):
            raise ValueError(f"patches must be whole numbers of at least 1, got {list(patches)}")
        rng, self.samples, largest = random.Random(stable_seed("patches", seed)), 0, max(patches)
        while True:
            budget = rng.choice(patches)
            size = batch_size * (largest // budget)
            if self.samples + size > samples:
                break
            self._drawn.append((size, budget))
            self.samples += size
        if not self._drawn:
            raise DataError(f"an epoch has {samples} samples, less than a batch of {size}: choose a smaller batch_size")

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._drawn) or self.samples // self.batch_size

    def at(self, number: int) -> Planned:
        """Batch `number`, counted over all epochs."""
        if not self._drawn:
            return Planned(number * self.batch_size, self.batch_size)
        epoch, step = divmod(number, len(self))
        if self._epoch[0] != epoch:
            order = self._drawn.copy()
            random.Random(stable_seed("patches", self.seed, epoch)).shuffle(order)
            starts = accumulate((size for size, _ in order), initial=epoch * self.samples)
            planned = [Planned(first, size, (budget,)) for first, (size, budget) in zip(starts, order, strict=False)]
            self._epoch = (epoch, planned)
        return self._epoch[1][step]


def epoch_batches(
    count: int,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    patches: Sequence[int] = (),
) -> list[list[tuple[int, ...]]]:
    """A rank's batches of indices from batch `start` on.

    One seeded permutation is cut into global batches, each of which is split over the ranks, so global batch k holds
    the same samples for every world size. An incomplete last batch is dropped. `patches` as of `Schedule`.
    """
    per_rank(batch_size, world)
    order, schedule = epoch_order(count, seed, epoch).tolist(), Schedule(count, batch_size, patches, seed)
    batches = []
    for step in range(start, len(schedule)):
        planned = schedule.at(epoch * len(schedule) + step)
        first = planned.first - epoch * schedule.samples
        batches.append([(epoch, i, *planned.patches) for i in order[first + rank : first + planned.size : world]])
    return batches


def epoch_order(count: int, seed: int, epoch: int, *of: str) -> Tensor:
    """The permutation (count,) of an epoch; `of` names one of several data sets."""
    generator = torch.Generator().manual_seed(stable_seed("order", seed, epoch, *of))
    return torch.randperm(count, generator=generator)


def load(
    examples: TrainingExamples, batches: Iterable[list[tuple[int, ...]]], pad_id: int, num_workers: int
) -> DataLoader[Batch]:
    """The DataLoader of these batches of indices."""
    return DataLoader(
        examples,  # type: ignore[arg-type]  # of examples, which are collated to batches
        batch_sampler=batches,
        collate_fn=partial(collate, pad_id=pad_id),
        **loading(num_workers),
    )


def open_epoch(
    dataset: CaptionDataset,
    batch_size: int,
    epoch: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    patches: Sequence[int] = (),
    endless: bool = False,
) -> DataLoader:
    """This rank's DataLoader over one epoch from batch `start` on, and if `endless` over all later ones; `batch_size`
    is global.
    """

    def batches() -> Iterator[list[tuple[int, ...]]]:
        for number in count_from(epoch) if endless else [epoch]:
            first = start if number == epoch else 0
            yield from epoch_batches(len(dataset), batch_size, dataset.seed, number, first, rank, world, patches)

    return load(dataset, batches(), dataset.tokenizer.pad_id, num_workers)


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
        **loading(num_workers),
    )
