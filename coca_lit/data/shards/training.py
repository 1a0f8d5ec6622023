"""What training reads of indexed shards: a map-style data set of all their samples, as examples.

What makes a sample is told in `coca_lit.data.shards.sample`, how it is found in `coca_lit.data.shards.index`.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from torch import Tensor

from coca_lit.data.bad_samples import BadSample, BadSampleError, LostShardError
from coca_lit.data.batch import Example
from coca_lit.data.examples import Index, TrainingExamples
from coca_lit.data.inputs import IMAGES, ImageReader
from coca_lit.data.mixture import Source, draw
from coca_lit.data.shards.index import TarIndex
from coca_lit.data.shards.sample import pair_of
from coca_lit.data.sources import TrainTransform
from coca_lit.data.transforms import augmented
from coca_lit.distributed import stable_seed
from coca_lit.errors import DataError
from coca_lit.models.inputs import Images
from coca_lit.tokenizer import Tokenizer

SHARD_TRIES = 10  # samples of a shard that are tried in place of a bad one


class Sample(NamedTuple):
    """A sample of a shard whose image is decoded."""

    pixels: Tensor  # (3, H, W) uint8, the whole image
    caption: str
    key: str
    shard: str  # a path or URL


SampleStep = Callable[[Sample, random.Random], tuple[Images, dict[str, Any]]]
"""Makes of a sample the image to train on, in place of the transform, and what joins `Batch.extras`. An error that it
raises ends the training. Workers get a copy of it.
"""
StepFactory = Callable[[Any, TrainTransform, Sequence[TarIndex]], SampleStep]
"""What a project declares in `[sample_steps]`: makes a step from the value of its argument, the transform that the step
takes the place of, and the indexes of all shards. Raises `DataError` for what does not fit them.
"""


@dataclass(eq=False, repr=False)
class IndexedShards(TrainingExamples):
    """The samples of all sources, one after the other: the image of each is decoded and cropped, and one of its
    captions is drawn and tokenised.

    Args:
        within_shard: a bad sample is replaced by one of its shard, or of the next shard if that is lost or has given
            `SHARD_TRIES` bad ones, and not by one of the whole source.
        step: in place of `transform`, for images.
        captions: of each image, each drawn as the first one is.
        reader: of the images.
    """

    sources: Sequence[Source]
    transform: TrainTransform
    tokenizer: Tokenizer
    caption_keys: Mapping[str, float]  # with the probability of each
    seed: int
    max_bad_fraction: float
    within_shard: bool = False
    step: SampleStep | None = None
    captions: int = 1
    reader: ImageReader = IMAGES

    max_tries = 100  # at the 5 % of bad samples that are usual on the web, even ten in a row occur

    def __post_init__(self) -> None:
        super().__init__(self.seed, self.max_bad_fraction)
        self.indexes = [index for source in self.sources for index in source.shards]
        self.shard_ends = [*accumulate(map(len, self.indexes))]
        self.source_ends = [*accumulate(source.samples for source in self.sources)]
        self._lost: dict[int, LostShardError] = {}  # remote shards, for which the store need not be asked again
        self.bad.found += [fault for index in self.indexes for fault in index.faults]  # for the first example

    def __len__(self) -> int:
        return self.shard_ends[-1]

    def example(self, index: Index) -> Example:
        """Crop and caption depend on seed, pass and key alone."""
        number = bisect_right(self.shard_ends, index.i)
        tar = self.indexes[number]
        row = index.i - self.shard_ends[number] + len(tar)
        shard = tar.shard.name
        if number in self._lost:
            raise LostShardError(self._lost[number].sample._replace(key=tar.key(row)))
        try:
            fields = tar.read(row, self.reader.suffixes)
        except LostShardError as error:
            if tar.shard.is_remote:
                self._lost[number] = error
            raise
        content, captions = pair_of(fields, self.caption_keys, shard, self.reader)
        key = fields["__key__"]
        seed = (self.seed, index.turn, key)
        rng = random.Random(stable_seed("image", *seed))
        caption = draw(captions, self.caption_keys, "caption", *seed)
        source = self.reader.member(content, f"{key} in {shard}")
        extras: dict[str, Any] = {}
        try:
            if self.step is None:
                image = augmented(source, self.transform, rng, index.budget)
            else:
                pixels = source.pixels()
        except DataError as error:
            raise BadSampleError(BadSample(shard, key, f"unreadable {self.reader.kind}", str(error))) from error
        if self.step is not None:
            image, extras = self.step(Sample(pixels, caption, key, shard), rng)
        name = self.sources[bisect_right(self.source_ends, index.i)].name
        if name:
            extras["source"] = name
        further = [draw(captions, self.caption_keys, "caption", n, *seed) for n in range(1, self.captions)]
        return Example(
            image,
            self.tokenizer.encode(caption),
            f"{shard}/{key}",
            further_tokens=tuple(self.tokenizer.encode(text) for text in further),
            extras=extras,
        )

    def replacement(self, i: int, rng: random.Random, error: BadSampleError, tries: int) -> int:
        """A sample of the same source."""
        source = bisect_right(self.source_ends, i)
        start = self.source_ends[source - 1] if source else 0
        end = self.source_ends[source]
        if self.within_shard:
            shard = bisect_right(self.shard_ends, i)
            if isinstance(error, LostShardError) or tries % SHARD_TRIES == 0:
                after = self.shard_ends[shard]
                shard = bisect_right(self.shard_ends, after if after < end else start)
            start = self.shard_ends[shard] - len(self.indexes[shard])
            end = self.shard_ends[shard]
        return rng.randrange(start, end)
