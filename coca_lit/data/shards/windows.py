"""The order of sets that are too large, or too far away, to be read at random: samples are shuffled in windows.

The shards of a source, in an order drawn once for all passes, are divided evenly among logical readers. In every pass
a reader permutes its shards, cuts their samples into windows of limited number and size, and shuffles each window.
Item j of a global batch of B comes from reader j // (B / readers), whatever process asks for it. The order depends on
the seed, the readers and the limits alone, and any batch is computed without the batches before it.

Processes take neighbouring items, and so neighbouring readers: where the number of machines divides that of readers,
each machine reads shards of its own, the same ones in every pass. (The readers are what MosaicML's Streaming calls
canonical nodes.) A shard is fetched by two machines if it was divided between their readers, or if they share a reader.
"""

import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, count, islice, pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from coca_lit.data.examples import Index
from coca_lit.data.loader import ShuffledBatches, epoch_order
from coca_lit.data.mixture import Source, counts_after, weighted_round_robin
from coca_lit.distributed import stable_seed

if TYPE_CHECKING:
    from coca_lit.data.shards.remote.shards import RemoteShard


class Windows(NamedTuple):
    """How much is shuffled at a time: of all readers and, by their weights, all sources together."""

    samples: int
    bytes: float  # of shards
    readers: int  # a divisor of the batch size

    def cache_bytes(self, largest: int, sources: int) -> float:
        """Room for three windows in a row of each reader, which are read, awaited by workers, and fetched ahead; each
        may begin and end within a shard of the `largest` size.
        """
        return 3 * self.bytes + 2 * self.readers * sources * largest


class Piece(NamedTuple):
    """Neighbouring samples of a shard."""

    shard: int  # in its source
    first: int
    samples: int


class Pass(NamedTuple):
    """What a reader reads in one pass."""

    windows: list[list[Piece]]
    starts: list[int]  # of each window, in samples of the reader


class SourceOrder:
    """Which sample of a source each reader reads k-th.

    Args:
        share: of the windows.
        first: index of the first sample of the source, counted over all sources.
    """

    def __init__(self, source: Source, windows: Windows, share: float, seed: int, first: int) -> None:
        self.source = source
        self.seed = seed
        self.max_samples, self.max_bytes = (limit * share / windows.readers for limit in windows[:2])
        self.counts = [len(index) for index in source.shards]
        self.starts = [*accumulate(self.counts, initial=first)]
        shards = list(range(len(self.counts)))
        self._rng("readers").shuffle(shards)
        ends = [*accumulate(self.counts[shard] for shard in shards)]
        cuts = [ends[-1] * reader // windows.readers for reader in range(windows.readers + 1)]
        self.pieces = [self._between(shards, ends, start, max(start + 1, end)) for start, end in pairwise(cuts)]
        self.per_pass = [sum(piece.samples for piece in pieces) for pieces in self.pieces]  # one sample more or less
        self._passes: dict[int, dict[int, Pass]] = {reader: {} for reader in range(windows.readers)}  # the last two
        self._shuffled: dict[int, tuple[tuple[int, int], list[int]]] = {}  # of each reader: its window

    def sample(self, reader: int, k: int) -> tuple[int, int]:
        """(pass, i) of the `k`-th sample of a reader, from 0."""
        turn, number, place = self._place(reader, k)
        known = self._shuffled.get(reader)
        if known is None or known[0] != (turn, number):
            pieces = self._pass(reader, turn).windows[number]
            samples = torch.cat([self.starts[at] + first + torch.arange(count) for at, first, count in pieces])
            order = epoch_order(len(samples), self.seed, turn, self.source.name, str(reader), str(number))
            self._shuffled[reader] = (turn, number), samples[order].tolist()
        return turn, self._shuffled[reader][1][place]

    def shards(self, reader: int, first: int, last: int) -> Iterator[tuple[int, int]]:
        """(windows from here, shard) from the window of sample `first` to one window after that of sample `last`."""
        turn, number, _ = self._place(reader, first)
        end = self._place(reader, last)[:2]
        for distance in count():
            yield from ((distance, piece.shard) for piece in self._pass(reader, turn).windows[number])
            if (turn, number) > end:
                return
            number += 1
            if number == len(self._pass(reader, turn).windows):
                turn += 1
                number = 0

    def _place(self, reader: int, k: int) -> tuple[int, int, int]:
        """(pass, window, place in the window)"""
        turn, place = divmod(k, self.per_pass[reader])
        starts = self._pass(reader, turn).starts
        number = bisect_right(starts, place) - 1
        return turn, number, place - starts[number]

    def _pass(self, reader: int, turn: int) -> Pass:
        known = self._passes[reader]
        if turn not in known:
            if len(known) == 2:
                del known[min(known)]
            pieces = list(self.pieces[reader])
            self._rng("shards", turn, reader).shuffle(pieces)
            # Two readers share a shard that is divided between them: both read it early, so that it is fetched once.
            pieces.sort(key=lambda piece: piece.samples == self.counts[piece.shard])
            windows = list(self._cut(pieces))
            lengths = (sum(piece.samples for piece in window) for window in windows)
            known[turn] = Pass(windows, [*accumulate(lengths, initial=0)][:-1])
        return known[turn]

    def _cut(self, pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
        """Windows within the limits, but of at least one sample."""
        window: list[Piece] = []
        samples, size = self.max_samples, self.max_bytes  # that are left
        for shard, first, left in pieces:
            each = self.source.shards[shard].stamp.bytes / self.counts[shard]
            while left:
                taken = min(left, max(int(min(samples, size / each)), 0 if window else 1))
                if not taken:
                    yield window
                    window = []
                    samples = self.max_samples
                    size = self.max_bytes
                    continue
                window.append(Piece(shard, first, taken))
                first += taken
                left -= taken
                samples -= taken
                size -= taken * each
        if window:
            yield window

    def _between(self, shards: Sequence[int], ends: Sequence[int], start: int, end: int) -> list[Piece]:
        """The samples from `start` to `end` of the shards in this order."""
        pieces = []
        while start < end:
            place = bisect_right(ends, start)
            shard = shards[place]
            first = start - ends[place] + self.counts[shard]
            pieces.append(Piece(shard, first, min(self.counts[shard] - first, end - start)))
            start += pieces[-1].samples
        return pieces

    def _rng(self, what: str, *of: int) -> random.Random:
        return random.Random(stable_seed(what, self.seed, self.source.name, *of))


@dataclass(eq=False, kw_only=True)
class WindowedBatches(ShuffledBatches):
    """The same in the order of windows, with the shards fetched ahead.

    All readers take from the same source at a time, from each by its weight.

    Args:
        behind: batches that workers may still have to read when a later one is asked for.
    """

    windows: Windows
    behind: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.orders = [
            SourceOrder(source, self.windows, source.weight / sum(self.weights), self.seed, first)
            for source, first in zip(self.sources, self.starts, strict=False)
        ]

    def __iter__(self) -> Iterator[list[Index]]:
        if not any(index.shard.is_remote for source in self.sources for index in source.shards):
            yield from super().__iter__()
            return
        from coca_lit.data.shards.remote.shards import Ahead

        with closing(Ahead()) as ahead:
            for number in self.numbers():
                ahead.need(number, self._remote_shards(number))
                ahead.release(number - self.behind)
                yield self.part(number)

    def part(self, number: int) -> list[Index]:
        """Neighbouring samples, and so those of neighbouring readers."""
        turns = self._turns(number)
        budget = self.schedule.at(number).budget
        places = (divmod(item, len(turns)) for item in self._items(number))
        return [
            Index(*self.orders[source].sample(reader, k), budget) for reader, i in places for source, k in [turns[i]]
        ]

    def _items(self, number: int) -> range:
        size = self.schedule.at(number).size
        return range(self.rank * size // self.world, (self.rank + 1) * size // self.world)

    def _turns(self, number: int) -> list[tuple[int, int]]:
        """(source, k) of what each reader contributes to a batch."""
        first, size, _ = self.schedule.at(number)
        readers = self.windows.readers
        before = counts_after(first // readers, self.weights)
        return list(islice(weighted_round_robin(self.weights, before), size // readers))

    def _remote_shards(self, number: int) -> "list[RemoteShard]":
        """The remote shards of this rank's batch, and of what follows it."""
        items = self._items(number)
        turns = self._turns(number)
        readers = range(items[0] // len(turns), items[-1] // len(turns) + 1)
        found: list[tuple[int, RemoteShard]] = []
        for place, (source, order) in enumerate(zip(self.sources, self.orders, strict=True)):
            of_source = [k for i, k in turns if i == place]
            if of_source:
                for distance, shard in (x for r in readers for x in order.shards(r, of_source[0], of_source[-1])):
                    if source.shards[shard].shard.is_remote:
                        found.append((distance, cast("RemoteShard", source.shards[shard].shard)))
        return [shard for _, shard in sorted(found, key=itemgetter(0))]
