"""Map-style data sets: what one training or validation example is."""

import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from coca_lit.data.bad_samples import BadSample, BadSampleError, BadSamples
from coca_lit.data.batch import Example
from coca_lit.data.feature_cache import is_mirrored, mirrored, read_tokens
from coca_lit.data.pixels import load_pixels
from coca_lit.data.records import MAX_MISSING, Record
from coca_lit.data.transforms import TrainTransform, Transform, whole
from coca_lit.errors import DataError
from coca_lit.seeding import stable_seed
from coca_lit.tokenizer import Tokenizer


class TrainingExamples(Dataset[Example]):
    """Examples indexed by (epoch, i), the same on any worker of any rank, before and after a resume.

    For a sample that cannot be used another one stands in, drawn with a key of its own; more than `max_bad_fraction` of
    them stop the training.
    """

    max_tries = 10  # one bad image is an accident, ten in a row are a broken disk

    def __init__(self, seed: int, max_bad_fraction: float) -> None:
        self.seed, self.bad = seed, BadSamples(max_bad_fraction)

    def __len__(self) -> int:
        raise NotImplementedError

    def example(self, epoch: int, i: int) -> Example:
        """Raises `BadSampleError` if there is none."""
        raise NotImplementedError

    def replacement(self, i: int, rng: random.Random) -> int:
        """A sample to take instead of `i`."""
        return rng.randrange(len(self))

    def __getitem__(self, index: tuple[int, int]) -> Example:
        epoch, i = index
        rng = random.Random(stable_seed("stand-in", self.seed, epoch, i))
        for _ in range(self.max_tries):
            self.bad.seen += 1
            try:
                return self.example(epoch, i)._replace(bad=self.bad.take())
            except BadSampleError as error:
                self.bad.catch(error)
            i = self.replacement(i, rng)
        raise DataError(f"no usable image in {self.max_tries} tries: {self.bad.summary()}")


class CaptionDataset(TrainingExamples):
    """Training examples of records: one caption drawn at random, a random crop, both keyed by (seed, epoch, record id).

    Images that are not there at all count as bad.
    """

    def __init__(self, records: Sequence[Record], transform: TrainTransform, tokenizer: Tokenizer, seed: int = 0):
        super().__init__(seed, MAX_MISSING)
        self.records, self.transform, self.tokenizer = records, transform, tokenizer

    def __len__(self) -> int:
        return len(self.records)

    def example(self, epoch: int, i: int) -> Example:
        record = self.records[i]
        rng = random.Random(stable_seed(self.seed, epoch, record.id))
        caption = rng.choice(record.captions)
        try:
            pixels = load_pixels(record.image)
        except DataError as error:
            raise BadSampleError(BadSample("", str(record.id), "unreadable image", str(error))) from error
        return _example(self.transform(pixels, rng), caption, record, self.tokenizer)


class CachedCaptionDataset(CaptionDataset):
    """Training examples whose image is one of several views of it, drawn like the caption, as tokens of the encoder.

    Args:
        views: files of `coca_lit.data.feature_cache`.
    """

    def __init__(self, records: Sequence[Record], views: Sequence[Path], tokenizer: Tokenizer, seed: int = 0):
        super().__init__(records, whole, tokenizer, seed)
        self.views = views

    def example(self, epoch: int, i: int) -> Example:
        record = self.records[i]
        rng = random.Random(stable_seed(self.seed, epoch, record.id))
        caption, view = rng.choice(record.captions), rng.randrange(len(self.views))
        try:
            tokens = read_tokens(self.views[view], i)
        except DataError as error:
            raise BadSampleError(BadSample("", str(record.id), "unreadable image", str(error))) from error
        return _example(tokens, mirrored(caption) if is_mirrored(view) else caption, record, self.tokenizer)


class FirstCaptionDataset(Dataset[Example]):
    """Validation examples: the first caption and a deterministic transform, so that losses compare over time.

    For the same reason an image that cannot be decoded is an error.
    """

    def __init__(self, records: Sequence[Record], transform: Transform, tokenizer: Tokenizer):
        self.records, self.transform, self.tokenizer = records, transform, tokenizer

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Example:
        record = self.records[i]
        return _example(self._image(i), record.captions[0], record, self.tokenizer)

    def _image(self, i: int) -> Tensor:
        return self.transform(self.records[i].image())


class CachedFirstCaptionDataset(FirstCaptionDataset):
    """Validation examples with the tokens of the encoder in place of pixels; `view` is the file of the plain images."""

    def __init__(self, records: Sequence[Record], view: Path, tokenizer: Tokenizer):
        super().__init__(records, _no_transform, tokenizer)
        self.view = view

    def _image(self, i: int) -> Tensor:
        return read_tokens(self.view, i)


def _no_transform(image: Image.Image) -> Tensor:
    raise NotImplementedError("cached images are not transformed")


def _example(image: Tensor, caption: str, record: Record, tokenizer: Tokenizer) -> Example:
    """With the caption; of a question with the question and that answer as one text."""
    if not record.question:
        return Example(image, tokenizer.encode(caption), str(record.id))
    tokens, prefix_length = tokenizer.encode_answer(record.question, caption)
    return Example(image, tokens, str(record.id), prefix_length=prefix_length, answers=record.captions)
