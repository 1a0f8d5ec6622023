"""From a sample of a shard to a training example."""

import random
from collections.abc import Mapping
from typing import NamedTuple

from coca_lit.data.bad_samples import BadSample, BadSampleError
from coca_lit.data.batch import Example
from coca_lit.data.pixels import decode_pixels
from coca_lit.data.shards.mixture import draw
from coca_lit.data.shards.reader import ShardSample
from coca_lit.data.transforms import TrainTransform
from coca_lit.errors import DataError
from coca_lit.seeding import stable_seed
from coca_lit.tokenizer import Tokenizer


class Preprocess(NamedTuple):
    """Decodes and crops the image, draws one of the captions and tokenises it."""

    transform: TrainTransform
    tokenizer: Tokenizer
    caption_keys: Mapping[str, float]  # with the probability of each
    seed: int

    def __call__(self, sample: ShardSample, source: str, *turn: int) -> Example:
        """Crop and caption depend on seed, turn and key alone. Raises `BadSampleError` for an unreadable image."""
        try:
            pixels = decode_pixels(sample.image, f"{sample.key} in {sample.shard}")
        except DataError as error:
            raise BadSampleError(BadSample(sample.shard, sample.key, "unreadable image", str(error))) from error
        seed: tuple[int | str, ...] = (self.seed, *turn, sample.key)
        crop = self.transform(pixels, random.Random(stable_seed("image", *seed)))
        caption = draw(sample.captions, self.caption_keys, random.Random(stable_seed("caption", *seed)))
        return Example(crop, self.tokenizer.encode(caption), f"{sample.shard}/{sample.key}", source=source)
