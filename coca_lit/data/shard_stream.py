"""An endless, seeded, resumable stream of batches from shards, spread over ranks and DataLoader workers.

Batch b of a rank always comes from its logical worker b % workers, whichever process plays that part. A stream that
starts at batch b therefore reads what each logical worker has already delivered and drops it undecoded. The order is
fixed for a given (seed, ranks, workers); unlike that of indexed data it changes with their number.
"""

import random
from collections import deque
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import count, islice
from typing import NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from coca_lit.data.bad_samples import BadSamples
from coca_lit.data.batch import Batch, Example, collate
from coca_lit.data.records import DataError, decode_image
from coca_lit.data.seeding import seeded_torch, stable_seed
from coca_lit.data.shard_set import Shard
from coca_lit.data.shards import ShardSample, read_shard
from coca_lit.data.transforms import Transform
from coca_lit.tokenizer import Tokenizer


class ShardOrder(NamedTuple):
    """Which samples a logical worker reads, in which order.

    A worker goes through its shards of the epoch again and again, each time in another order; samples are mixed within
    a buffer. `rank` and `world` count training processes.
    """

    shards: Sequence[Shard]
    seed: int = 0
    rank: int = 0
    world: int = 1
    shuffle_buffer: int = 1000  # samples, still encoded
    caption_key: str | None = None

    def samples(self, epoch: int, worker: int, workers: int, bad: BadSamples) -> Iterator[tuple[int, ShardSample]]:
        """Endless (pass, sample); needs at least one shard per worker of every rank."""
        plan = list(self.shards)
        random.Random(stable_seed("shards", self.seed, epoch)).shuffle(plan)
        mine = plan[self.rank * workers + worker :: self.world * workers]
        for turn in count():
            rng = random.Random(stable_seed("samples", self.seed, epoch, turn, self.rank, worker))
            rng.shuffle(mine)
            one_pass = (s for shard in mine for s in read_shard(shard, self.caption_key, bad, verify=turn == 0))
            yield from ((turn, sample) for sample in _shuffled(one_pass, self.shuffle_buffer, rng))
            bad.end_of_pass()


class ShardBatches(IterableDataset[Batch]):
    """This rank's batches of `batch_size` (per rank) samples from batch `start` of an epoch on; it never ends.

    A batch is the next `batch_size` samples of its worker. One that cannot be decoded is replaced by a sample of the
    batch after it, which shows that one again: the position then depends on no decoding, and every batch is full.
    """

    def __init__(
        self,
        order: ShardOrder,
        transform: Transform,
        tokenizer: Tokenizer,
        batch_size: int,
        epoch: int = 0,
        start: int = 0,
        max_bad_fraction: float = 0.05,
    ):
        self.order, self.transform, self.tokenizer, self.batch_size = order, transform, tokenizer, batch_size
        self.epoch, self.start, self.max_bad_fraction = epoch, start, max_bad_fraction

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        process, workers = (info.id, info.num_workers) if info else (0, 1)
        worker = (process + self.start) % workers
        delivered = self.start // workers + (worker < self.start % workers)  # batches of this logical worker
        bad = BadSamples(self.max_bad_fraction)
        samples = self.order.samples(self.epoch, worker, workers, bad)
        rest = islice(samples, delivered * self.batch_size, None)
        return self._batches(rest, bad)

    def _batches(self, samples: Iterator[tuple[int, ShardSample]], bad: BadSamples) -> Iterator[Batch]:
        window: deque[tuple[int, ShardSample]] = deque()  # the current batch, and what replaces its bad samples
        while True:
            examples: list[Example] = []
            i = 0
            while len(examples) < self.batch_size:
                if i == len(window):
                    window.append(next(samples))
                try:
                    examples.append(self._example(*window[i]))
                except DataError as error:
                    if i < self.batch_size:  # a bad replacement is counted in its own batch
                        bad.add("unreadable image", window[i][1].shard, window[i][1].key, str(error))
                i += 1
            yield collate(examples, self.tokenizer.pad_id)._replace(bad=bad.take())
            for _ in range(self.batch_size):
                window.popleft()

    def _example(self, turn: int, sample: ShardSample) -> Example:
        image = decode_image(BytesIO(sample.image), f"{sample.key} in {sample.shard}")
        with seeded_torch(stable_seed("image", self.order.seed, self.epoch, turn, sample.key)):
            pixels = self.transform(image)
        return Example(pixels, self.tokenizer.encode(sample.caption), f"{sample.shard}/{sample.key}")


def _shuffled(samples: Iterator[ShardSample], size: int, rng: random.Random) -> Iterator[ShardSample]:
    """Each sample once, in an order mixed by a buffer of `size`."""
    buffer = list(islice(samples, size))
    for sample in samples:
        i = rng.randrange(size)
        yield buffer[i]
        buffer[i] = sample
    rng.shuffle(buffer)
    yield from buffer
