"""An endless, seeded, resumable stream of batches from shards, spread over ranks and DataLoader workers.

Batch b of a rank always comes from its logical worker b % workers, whichever process takes that role. A stream that
starts at batch b therefore reads what each logical worker has already delivered and drops it undecoded. The order is
fixed for a given (seed, ranks, workers) and, unlike that of indexed shards, changes with their number. The proportions
of a mixture do not.
"""

import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from types import MappingProxyType
from typing import NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from coca_lit.data.bad_samples import BadSampleError, BadSamples
from coca_lit.data.batch import Batch, Example, collate
from coca_lit.data.loader import Planned, Schedule
from coca_lit.data.shards.listing import Shard
from coca_lit.data.shards.mixture import Source, interleave
from coca_lit.data.shards.reader import Preprocess, ShardSample, read_shard
from coca_lit.data.transforms import CropOfEncoded, TrainTransform
from coca_lit.seeding import stable_seed
from coca_lit.tokenizer import Tokenizer

SHUFFLE_BUFFER = 5000  # samples, as many as OpenCLIP's
MAX_BUFFER = 512 * 2**20  # bytes of encoded samples that a worker shuffles; photos of LAION have 20 to 100 kB
OPEN_SHARDS = 8  # each holds a sample in memory besides the buffer


class StreamSample(NamedTuple):
    """A sample with what its random crop and caption depend on."""

    source: str
    turn: int  # number of the pass over its source, from 0
    sample: ShardSample


class ShardOrder(NamedTuple):
    """Which samples a logical worker reads, in which order.

    A worker makes endless passes over its shards of each source, each in a different order. It reads several shards at
    a time, a sample of one of them at random, and shuffles what it read within a buffer. Sources are interleaved by
    their weights and share the buffer and the open shards by them. `rank` and `world` count training processes.
    """

    sources: Sequence[Source[Shard]]
    seed: int = 0
    rank: int = 0
    world: int = 1
    shuffle_buffer: int = SHUFFLE_BUFFER  # samples of all sources, still encoded
    open_shards: int = OPEN_SHARDS  # that a worker reads at a time
    caption_keys: Mapping[str, float] = MappingProxyType({"txt": 1.0})  # with the probability of each

    def samples(self, epoch: int, worker: int, workers: int, bad: BadSamples) -> Iterator[StreamSample]:
        """Endless; needs at least one shard of each source per worker of every rank."""
        streams = [self.of_source(source, epoch, worker, workers, bad) for source in self.sources]
        return interleave(streams, [source.weight for source in self.sources])

    def of_source(
        self, source: Source[Shard], epoch: int, worker: int, workers: int, bad: BadSamples
    ) -> Iterator[StreamSample]:
        """The samples of one source."""
        seed = (self.seed, epoch, source.name)
        plan = list(source.shards)
        random.Random(stable_seed("shards", *seed)).shuffle(plan)
        mine = plan[self.rank * workers + worker :: self.world * workers]
        share = source.weight / sum(other.weight for other in self.sources)
        buffer, open_shards = (max(1, round(n * share)) for n in (self.shuffle_buffer, self.open_shards))
        for turn in count():
            rng = random.Random(stable_seed("samples", *seed, turn, self.rank, worker))
            rng.shuffle(mine)
            shards = (read_shard(shard, self.caption_keys, bad, verify=turn == 0) for shard in mine)
            one_pass = _shuffled(_mixed(shards, open_shards, rng), buffer, round(MAX_BUFFER * share), rng)
            yield from (StreamSample(source.name, turn, sample) for sample in one_pass)
            bad.end_of_pass()


class ShardBatches(IterableDataset[Batch]):
    """This rank's part of the batches of a schedule, from batch `start` of an epoch on; endless.

    A batch is the next samples of its worker. A sample that cannot be decoded is replaced by one of the
    following batch, which shows it again: every batch is full, and the position does not depend on what can be decoded.
    """

    def __init__(
        self,
        order: ShardOrder,
        transform: TrainTransform | CropOfEncoded,
        tokenizer: Tokenizer,
        schedule: Schedule,
        epoch: int = 0,
        start: int = 0,
        max_bad_fraction: float = 0.05,
    ):
        self.preprocess = Preprocess(transform, tokenizer, order.caption_keys, order.seed)
        self.order, self.schedule, self.max_bad_fraction = order, schedule, max_bad_fraction
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        process, workers = (info.id, info.num_workers) if info else (0, 1)
        worker = (process + self.start) % workers
        delivered = sum(self._planned(step).size for step in range(worker, self.start, workers))  # by this worker
        first = self.start + (worker - self.start) % workers
        bad = BadSamples(self.max_bad_fraction)
        samples = self.order.samples(self.epoch, worker, workers, bad)
        planned = (self._planned(step) for step in count(first, workers))
        return self._batches(islice(samples, delivered, None), planned, bad)

    def _planned(self, step: int) -> Planned:
        """This rank's part of a batch of the epoch."""
        planned = self.schedule.at(self.epoch * len(self.schedule) + step)
        return planned._replace(size=planned.size // self.order.world)

    def _batches(self, samples: Iterator[StreamSample], plan: Iterator[Planned], bad: BadSamples) -> Iterator[Batch]:
        window: deque[StreamSample] = deque()  # the current batch, and replacements for its bad samples
        for _, size, patches in plan:
            examples: list[Example] = []
            i = 0
            while len(examples) < size:
                if i == len(window):
                    window.append(next(samples))
                try:
                    source, turn, sample = window[i]
                    examples.append(self.preprocess(sample, source, self.epoch, turn, patches=patches))
                except BadSampleError as error:
                    if i < size:  # a bad replacement is counted in its own batch
                        bad.catch(error)
                i += 1
            yield collate(examples, self.preprocess.tokenizer.pad_id)._replace(bad=bad.take())
            for _ in range(size):
                window.popleft()


def _mixed(shards: Iterator[Iterator[ShardSample]], at_once: int, rng: random.Random) -> Iterator[ShardSample]:
    """The samples of all shards, each from a random one of the `at_once` that are open. As one ends, the next opens."""
    being_read = [*islice(shards, at_once)]
    while being_read:
        i = rng.randrange(len(being_read))
        if (sample := next(being_read[i], None)) is not None:
            yield sample
        else:
            being_read[i : i + 1] = islice(shards, 1)


def _shuffled(samples: Iterator[ShardSample], size: int, max_bytes: int, rng: random.Random) -> Iterator[ShardSample]:
    """Each sample once, shuffled by a buffer of `size` samples, or of fewer where these take more than `max_bytes`."""
    buffer: list[ShardSample] = []
    held = 0  # bytes in the buffer
    for sample in samples:
        held += sample.bytes
        if len(buffer) < size and (held <= max_bytes or not buffer):
            buffer.append(sample)
            continue
        i = rng.randrange(len(buffer))
        held -= buffer[i].bytes
        yield buffer[i]
        buffer[i] = sample
        while held > max_bytes and len(buffer) > 1:
            i = rng.randrange(len(buffer))
            buffer[i], buffer[-1] = buffer[-1], buffer[i]
            held -= buffer[-1].bytes
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer
