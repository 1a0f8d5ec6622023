"""Local shards as map-style data: exact shuffling over all of them, and any batch at once.

The order depends on the seed alone, not on the number of ranks and workers. A set of shards is gone through in passes,
each in an order of its own; epochs are cut from the passes one after the other, whatever their length.
"""

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import Sampler

from coca_lit.data.batch import Example
from coca_lit.data.examples import TrainingExamples
from coca_lit.data.loader import epoch_order, per_rank
from coca_lit.data.shards.example import Preprocess
from coca_lit.data.shards.index import TarIndex
from coca_lit.data.shards.mixture import counts_after, weighted_round_robin
from coca_lit.data.shards.reader import sample_of


class IndexedSource(NamedTuple):
    """One set of a mixture; a name of its own only where there are several."""

    name: str
    indexes: Sequence[TarIndex]
    weight: float = 1.0

    @property
    def samples(self) -> int:
        return sum(map(len, self.indexes))


class IndexedShards(TrainingExamples):
    """The samples of all sources, one after the other, indexed by (pass, i)."""

    max_tries = 100  # at the 5 % of bad samples that are usual on the web, even ten in a row come up

    def __init__(self, sources: Sequence[IndexedSource], preprocess: Preprocess, max_bad_fraction: float) -> None:
        super().__init__(preprocess.seed, max_bad_fraction)
        self.preprocess = preprocess
        self.indexes = [index for source in sources for index in source.indexes]
        self.names = [source.name for source in sources]
        self.shard_ends = [*accumulate(map(len, self.indexes))]
        self.source_ends = [*accumulate(source.samples for source in sources)]
        self.bad.found += [sample for index in self.indexes for sample, _ in index.faults]  # for the first example

    def __len__(self) -> int:
        return self.shard_ends[-1]

    def example(self, epoch: int, i: int) -> Example:
        shard = bisect_right(self.shard_ends, i)
        index = self.indexes[shard]
        fields = index.read(i - self.shard_ends[shard] + len(index))
        sample = sample_of(fields, self.preprocess.caption_keys, index.shard)
        return self.preprocess(sample, self.names[bisect_right(self.source_ends, i)], epoch)

    def replacement(self, i: int, rng: random.Random) -> int:
        """One of the same source."""
        source = bisect_right(self.source_ends, i)
        return rng.randrange(self.source_ends[source - 1] if source else 0, self.source_ends[source])


class IndexedBatches(Sampler[list[tuple[int, int]]]):
    """A rank's batches of (pass, i), from global batch `start` to `stop`, counted over all epochs."""

    def __init__(
        self,
        sources: Sequence[IndexedSource],
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        per_rank(batch_size, world)
        self.sources, self.batch_size, self.seed = sources, batch_size, seed
        self.start, self.stop, self.rank, self.world = start, stop, rank, world
        self.weights = [source.weight for source in sources]
        self.starts = [0, *accumulate(source.samples for source in sources)]
        self._orders: dict[int, tuple[int, Tensor]] = {}  # of each source, for the pass that it is in

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in range(self.start, self.stop):
            yield self.global_batch(number)[self.rank :: self.world]

    def global_batch(self, number: int) -> list[tuple[int, int]]:
        """The same for any number of ranks; found without those before it."""
        given = counts_after(number * self.batch_size, self.weights)
        return [
            self._sample(source, k) for source, k in islice(weighted_round_robin(self.weights, given), self.batch_size)
        ]

    def _sample(self, source: int, k: int) -> tuple[int, int]:
        """(pass, i) of the `k`-th sample that a source gives, from 0."""
        epoch, place = divmod(k, self._per_pass(source))
        return epoch, self.starts[source] + int(self._order(source, epoch)[place])

    def _per_pass(self, source: int) -> int:
        """All samples; if there is one source, those of whole batches, as with other indexed data."""
        count = self.sources[source].samples
        return count - count % self.batch_size if len(self.sources) == 1 and count >= self.batch_size else count

    def _order(self, source: int, epoch: int) -> Tensor:
        if self._orders.get(source, (None,))[0] != epoch:
            name = [self.sources[source].name] if self.sources[source].name else []
            self._orders[source] = epoch, epoch_order(self.sources[source].samples, self.seed, epoch, *name)
        return self._orders[source][1]
