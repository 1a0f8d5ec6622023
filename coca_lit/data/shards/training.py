"""What training reads of indexed shards: a map-style data set of all their samples, as examples.

What makes a sample is told in `coca_lit.data.shards.sample`, how it is found in `coca_lit.data.shards.index`.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from torch import Tensor

from coca_lit.data.bad_samples import BadSample, BadSampleError, LostShardError
from coca_lit.data.batch import Example
from coca_lit.data.examples import Index, TrainingExamples
from coca_lit.data.mixture import Source, draw
from coca_lit.data.pixels import decode_pixels
from coca_lit.data.shards.sample import CLIP_SUFFIXES, IMAGE_SUFFIXES, pair_of
from coca_lit.data.transforms import TrainTransform, as_tensor, augmented
from coca_lit.distributed import stable_seed
from coca_lit.errors import DataError
from coca_lit.models.inputs import Images
from coca_lit.tokenizer import Tokenizer

if TYPE_CHECKING:
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
        """Crop and caption depend on seed, pass and key alone."""
        number = bisect_right(self.shard_ends, index.i)
        tar = self.indexes[number]
        row, shard = index.i - self.shard_ends[number] + len(tar), tar.shard.name
        if number in self._lost:
            raise LostShardError(self._lost[number].sample._replace(key=tar.key(row)))
        try:
            fields = tar.read(row, self.suffixes)
        except LostShardError as error:
            if tar.shard.is_remote:
                self._lost[number] = error
            raise
        image, captions = pair_of(fields, self.caption_keys, shard, self.suffixes)
        key = fields["__key__"]
        seed = (self.seed, index.turn, key)
        rng, name = random.Random(stable_seed("image", *seed)), f"{key} in {shard}"
        caption = draw(captions, self.caption_keys, "caption", *seed)
        teachers: tuple[Teacher, ...] = ()
        try:
            crop: Images
            if self.frames:
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
        source = self.sources[bisect_right(self.source_ends, index.i)].name
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
