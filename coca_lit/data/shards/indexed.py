"""Indexed shards as a map-style data set: shuffling over all samples at once, and access to any batch. How indexes are
made is told in `coca_lit.data.shards.indexing`.

The order depends on the seed alone, not on the number of ranks and workers. The samples are read in passes, each in
its own order; epochs are cut from the passes one after the other, whatever their length.
"""

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from coca_lit.data.bad_samples import BadSample, BadSampleError, LostShardError
from coca_lit.data.batch import Example
from coca_lit.data.examples import Index, TrainingExamples
from coca_lit.data.loader import Schedule, epoch_order, per_rank
from coca_lit.data.shards.mixture import Source, counts_after, weighted_round_robin
from coca_lit.data.shards.reader import IMAGE_SUFFIXES, Preprocess, pair_of, read_limit
from coca_lit.data.shards.shard import ChangedError, Shard, Stamp

FILES = (IMAGE_SUFFIXES, ("txt",), ("json",))  # of a sample; the first of each that is there


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The N samples of a shard in tar order, complete or not."""

    shard: Shard
    stamp: Stamp
    keys: NDArray[np.uint8]  # all of them in UTF-8, one after the other: one long key must not make every other long
    key_ends: NDArray[np.int64]  # (N) in `keys`
    places: NDArray[np.int64]  # (N, 3, 2) offset and size of image, .txt and .json, 0 where there is none
    faults: Sequence[BadSample]  # found while reading the headers; without a key: of the shard as a whole

    def __len__(self) -> int:
        return len(self.places)

    @property
    def is_torn(self) -> bool:
        """Whether samples of the shard are lost, or it has none."""
        return any(not fault.key for fault in self.faults)

    def key(self, i: int) -> str:
        return self.keys[self.key_ends[i - 1] if i else 0 : self.key_ends[i]].tobytes().decode()

    def read(self, i: int) -> dict[str, Any]:
        """The members of sample `i` as in `read_fields`; `LostShardError` if the shard is gone or has changed."""
        key = self.key(i)
        fields: dict[str, Any] = {"__key__": key}
        try:
            with self.shard.open(self.stamp) as file:
                for names, (offset, size) in zip(FILES, self.places[i].tolist(), strict=True):
                    if size:
                        file.seek(offset)
                        fields[names[0]] = file.read(min(size, read_limit(f".{names[0]}")))
        except ChangedError as error:
            raise LostShardError(BadSample(self.shard.name, key, "shard changed after it was indexed")) from error
        except OSError as error:
            raise LostShardError(BadSample(self.shard.name, key, "unreadable shard", str(error))) from error
        return fields


class IndexedShards(TrainingExamples):
    """The samples of all sources, one after the other."""

    max_tries = 100  # at the 5 % of bad samples that are usual on the web, even ten in a row occur

    def __init__(
        self, sources: Sequence[Source], preprocess: Preprocess, max_bad_fraction: float, near: bool = False
    ) -> None:
        """With `near` a sample is replaced by one of its shard, or of the next one if that is lost."""
        super().__init__(preprocess.seed, max_bad_fraction)
        self.preprocess, self.near = preprocess, near
        self.indexes = [index for source in sources for index in source.shards]
        self.names = [source.name for source in sources]
        self.shard_ends = [*accumulate(map(len, self.indexes))]
        self.source_ends = [*accumulate(source.samples for source in sources)]
        self._lost: dict[int, LostShardError] = {}  # remote shards, for which the store need not be asked again
        self.bad.found += [fault for index in self.indexes for fault in index.faults]  # for the first example

    def __len__(self) -> int:
        return self.shard_ends[-1]

    def example(self, index: Index) -> Example:
        number = bisect_right(self.shard_ends, index.i)
        shard = self.indexes[number]
        row = index.i - self.shard_ends[number] + len(shard)
        if number in self._lost:
            raise LostShardError(self._lost[number].sample._replace(key=shard.key(row)))
        try:
            fields = shard.read(row)
        except LostShardError as error:
            if shard.shard.is_remote:
                self._lost[number] = error
            raise
        pair = pair_of(fields, self.preprocess.caption_keys, shard.shard.name)
        source = self.names[bisect_right(self.source_ends, index.i)]
        return self.preprocess(pair, fields["__key__"], shard.shard.name, index, source)

    def replacement(self, i: int, rng: random.Random, error: BadSampleError) -> int:
        """A sample of the same source."""
        source = bisect_right(self.source_ends, i)
        start, end = self.source_ends[source - 1] if source else 0, self.source_ends[source]
        if self.near:
            shard = bisect_right(self.shard_ends, i)
            if isinstance(error, LostShardError):
                after = self.shard_ends[shard]
                shard = bisect_right(self.shard_ends, after if after < end else start)
            start, end = self.shard_ends[shard] - len(self.indexes[shard]), self.shard_ends[shard]
        return rng.randrange(start, end)


@dataclass(eq=False)
class IndexedBatches(Sampler[list[Index]]):
    """A rank's batches, from global batch `start` to `stop` of a schedule, counted over all epochs."""

    sources: Sequence[Source]
    schedule: Schedule
    seed: int
    start: int
    stop: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        per_rank(self.schedule.batch_size, self.world)
        self.weights = [source.weight for source in self.sources]
        self.counts = [source.samples for source in self.sources]  # a sum over all shards
        self.starts = [0, *accumulate(self.counts)]  # of each source, in samples
        self._orders: dict[int, tuple[int, Tensor]] = {}  # of each source: its current pass and the order of that

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Index]]:
        for number in range(self.start, self.stop):
            yield self._part(number)

    def _part(self, number: int) -> list[Index]:
        """This rank's samples in a global batch, computed without the batches before it."""
        first, size, patches = self.schedule.at(number)
        order = weighted_round_robin(self.weights, counts_after(first, self.weights))
        return [Index(*self._sample(source, k), patches) for source, k in islice(order, self.rank, size, self.world)]

    def _sample(self, source: int, k: int) -> tuple[int, int]:
        """(pass, i) of the `k`-th sample of a source, from 0."""
        count, batch_size = self.counts[source], self.schedule.batch_size
        if len(self.sources) == 1 and count >= batch_size:
            count -= count % batch_size  # only whole batches, as with records
        turn, place = divmod(k, count)
        if self._orders.get(source, (None,))[0] != turn:
            name = [self.sources[source].name] if self.sources[source].name else []
            self._orders[source] = turn, epoch_order(self.counts[source], self.seed, turn, *name)
        return turn, self.starts[source] + int(self._orders[source][1][place])
