"""What training reads of indexed shards: a map-style data set of their samples, shuffled all at once, and any batch.

What makes a sample is told in `coca_lit.data.shards.sample`, how it is found in `coca_lit.data.shards.index`.

The order depends on the seed alone, not on the number of ranks and workers. The samples are read in passes, each in
its own order; epochs are cut from the passes one after the other, whatever their length.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING

from torch import Tensor

from coca_lit.data.bad_samples import BadSample, BadSampleError, LostShardError
from coca_lit.data.batch import Example
from coca_lit.data.examples import Index, TrainingExamples
from coca_lit.data.loader import Schedule, epoch_order, per_rank
from coca_lit.data.mixture import Source, counts_after, draw, weighted_round_robin
from coca_lit.data.pixels import decode_pixels
from coca_lit.data.shards.sample import CLIP_SUFFIXES, IMAGE_SUFFIXES, Pair, pair_of
from coca_lit.data.transforms import TrainTransform, as_tensor, augmented
from coca_lit.distributed import stable_seed
from coca_lit.errors import DataError
from coca_lit.models.inputs import Images
from coca_lit.tokenizer import Tokenizer

if TYPE_CHECKING:
    from coca_lit.data.encoded import CropOfEncoded, EncodedCrop
    from coca_lit.losses.distillation import Teacher

NEAR_TRIES = 10  # of samples of a shard in place of a bad one


@dataclass(eq=False, repr=False)
class IndexedShards(TrainingExamples):
    """The samples of all sources, one after the other: the image of each is decoded and cropped, and one of its
    captions is drawn and tokenised. With `near` a sample is replaced by one of its shard, or of the next one if that is
    lost or has given `NEAR_TRIES` bad ones.
    """

    sources: Sequence[Source]
    transform: TrainTransform
    tokenizer: Tokenizer
    caption_keys: Mapping[str, float]  # with the probability of each
    seed: int
    max_bad_fraction: float
    near: bool = False
    encoded: "CropOfEncoded | None" = None  # in place of `transform`, for images that are not decoded whole
    replay: "Callable[..., tuple[Tensor, tuple[Teacher, ...]]] | None" = None  # instead: crops that teachers have seen
    frames: int = 0  # of clips, which are read in place of images

    max_tries = 100  # at the 5 % of bad samples that are usual on the web, even ten in a row occur

    def __post_init__(self) -> None:
        super().__init__(self.seed, self.max_bad_fraction)
        self.suffixes: Sequence[str] = CLIP_SUFFIXES if self.frames else IMAGE_SUFFIXES
        self.indexes = [index for source in self.sources for index in source.shards]
        self.shard_ends = [*accumulate(map(len, self.indexes))]
        self.source_ends = [*accumulate(source.samples for source in self.sources)]
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
            fields = shard.read(row, self.suffixes)
        except LostShardError as error:
            if shard.shard.is_remote:
                self._lost[number] = error
            raise
        pair = pair_of(fields, self.caption_keys, shard.shard.name, self.suffixes)
        source = self.sources[bisect_right(self.source_ends, index.i)].name
        return self._preprocessed(pair, fields["__key__"], shard.shard.name, index, source)

    def _preprocessed(self, pair: Pair, key: str, shard: str, index: Index, source: str) -> Example:
        """Crop and caption depend on seed, pass and key alone. Raises `BadSampleError` for an unreadable image."""
        image, captions = pair
        seed = (self.seed, index.turn, key)
        rng, name = random.Random(stable_seed("image", *seed)), f"{key} in {shard}"
        caption = draw(captions, self.caption_keys, "caption", *seed)
        teachers: tuple[Teacher, ...] = ()
        try:
            crop: Images | EncodedCrop
            if self.encoded:
                crop = self.encoded(image, name, rng, shard)
            elif self.frames:
                from coca_lit.data.video import EncodedClip

                crop = augmented(EncodedClip(image, name, self.frames), self.transform, rng, index.patches)
            else:
                pixels = as_tensor(decode_pixels(image, name))
                crop = pixels if self.replay else self.transform(pixels, rng, index.patches)
        except DataError as error:
            reason = f"unreadable {'clip' if self.frames else 'image'}"
            raise BadSampleError(BadSample(shard, key, reason, str(error))) from error
        if self.replay:
            crop, teachers = self.replay(pixels, shard, key, caption, rng)
        return Example(crop, self.tokenizer.encode(caption), f"{shard}/{key}", source=source, teachers=teachers)

    def replacement(self, i: int, rng: random.Random, error: BadSampleError, tries: int) -> int:
        """A sample of the same source."""
        source = bisect_right(self.source_ends, i)
        start, end = self.source_ends[source - 1] if source else 0, self.source_ends[source]
        if self.near:
            shard = bisect_right(self.shard_ends, i)
            if isinstance(error, LostShardError) or tries % NEAR_TRIES == 0:
                after = self.shard_ends[shard]
                shard = bisect_right(self.shard_ends, after if after < end else start)
            start, end = self.shard_ends[shard] - len(self.indexes[shard]), self.shard_ends[shard]
        return rng.randrange(start, end)


@dataclass(eq=False)
class IndexedBatches:
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

    def __iter__(self) -> Iterator[list[Index]]:
        for number in range(self.start, self.stop):
            yield self.part(number)

    def part(self, number: int) -> list[Index]:
        """This rank's samples in a global batch, computed without the batches before it."""
        first, size, patches = self.schedule.at(number)
        order = weighted_round_robin(self.weights, counts_after(first, self.weights))
        samples: list[Index] = []
        for source, k in islice(order, self.rank, size, self.world):
            count = self.counts[source]
            if len(self.sources) == 1 and count >= self.schedule.batch_size:
                count -= count % self.schedule.batch_size  # only whole batches, as with records
            turn, place = divmod(k, count)
            if self._orders.get(source, (None,))[0] != turn:
                name = [self.sources[source].name] if self.sources[source].name else []
                self._orders[source] = turn, epoch_order(self.counts[source], self.seed, turn, *name)
            samples.append(Index(turn, self.starts[source] + int(self._orders[source][1][place]), patches))
        return samples
