"""Map-style data sets: how a training or validation example is made of a record."""

import random
from collections.abc import Sequence
from itertools import cycle, islice
from typing import NamedTuple

from torch.utils.data import Dataset

from coca_lit.data.bad_samples import BadSample, BadSampleError, BadSamples
from coca_lit.data.batch import Example
from coca_lit.data.records import Record, most_bad
from coca_lit.data.sources import TrainTransform, Transform
from coca_lit.data.transforms import augmented, loaded
from coca_lit.distributed import stable_seed
from coca_lit.errors import DataError
from coca_lit.models.inputs import Images
from coca_lit.tokenizer import Tokenizer

OBVIOUS = 10  # times as many bad draws stop a training, before a worker has drawn that many of the records


class Index(NamedTuple):
    """Which example, and what it depends on besides the seed."""

    turn: int  # pass over the data set; the epoch of records
    i: int
    budget: int | None = None  # for its image, where one was drawn for the batch


class TrainingExamples(Dataset[Example]):
    """Examples by `Index`, the same on any worker of any rank, before and after a resume.

    A sample that cannot be used is replaced by a random one, drawn with a seed of its own; more than `max_bad_fraction`
    of them stop the training.
    """

    max_tries = 10  # one bad image is an accident, ten in a row are a broken disk

    def __init__(self, seed: int, max_bad_fraction: float) -> None:
        self.seed = seed
        self.bad = BadSamples(max_bad_fraction)

    def __len__(self) -> int:
        raise NotImplementedError

    def example(self, index: Index) -> Example:
        """Raises `BadSampleError` if the sample cannot be used."""
        raise NotImplementedError

    def replacement(self, i: int, rng: random.Random, error: BadSampleError, tries: int) -> int:
        """The index of a sample to use instead of `i`, which raised the error at the given try."""
        return rng.randrange(len(self))

    def __getitem__(self, index: Index) -> Example:
        rng: random.Random | None = None
        wanted = index
        for tries in range(1, self.max_tries + 1):
            self.bad.seen += 1
            try:
                return self.example(index)._replace(bad=self.bad.take())
            except BadSampleError as error:
                self.bad.catch(error)
                rng = rng or random.Random(stable_seed("stand-in", self.seed, wanted.turn, wanted.i))
                index = index._replace(i=self.replacement(index.i, rng, error, tries))
        raise DataError(f"no usable image in {self.max_tries} tries: {self.bad.summary()}")


class CaptionDataset(TrainingExamples):
    """Training examples of records: a random caption and a random crop, both seeded by (seed, epoch, record id).

    Missing images count as bad. `most_bad` of the records may be: records, not draws, of which each worker has others.

    Args:
        captions: of each image; they differ while the record has others.
    """

    def __init__(
        self,
        records: Sequence[Record],
        transform: TrainTransform,
        tokenizer: Tokenizer,
        seed: int = 0,
        captions: int = 1,
    ) -> None:
        self.records = records
        self.transform = transform
        self.tokenizer = tokenizer
        self.captions = captions
        self._broken: set[int] = set()
        self._most = most_bad(len(records))
        super().__init__(seed, max_bad_fraction=min(OBVIOUS * self._most / max(len(records), 1), 1.0))

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: Index) -> Example:
        record = self.records[index.i]
        rng = random.Random(stable_seed(self.seed, index.turn, record.id))
        choice = rng.randrange(len(record.captions))
        try:
            image, record = self.image(index, record, rng)
            further = tuple(augmented(other, self.transform, rng, index.budget) for other in record.further)
        except DataError as error:
            raise BadSampleError(BadSample("", str(record.id), "unreadable image", str(error))) from error
        captions = [record.captions[choice]]
        if self.captions > 1:
            others = [*record.captions[:choice], *record.captions[choice + 1 :]]
            random.Random(stable_seed("captions", self.seed, index.turn, record.id)).shuffle(others)
            captions = [*islice(cycle(captions + others), self.captions)]
        return _example((image, *further), captions, record, self.tokenizer)

    def replacement(self, i: int, rng: random.Random, error: BadSampleError, tries: int) -> int:
        self._broken.add(i)
        if len(self._broken) > self._most:
            bad = error.sample
            count = f"{len(self._broken)} of {len(self):,} records"
            raise DataError(f"too many bad samples, at least {count}, e.g. {bad.key}: {bad.detail}; fix or remove them")
        return super().replacement(i, rng, error, tries)

    def image(self, index: Index, record: Record, rng: random.Random) -> tuple[Images, Record]:
        """The first image, and the record with the texts that go with it."""
        return augmented(record.image, self.transform, rng, index.budget), record


class FirstCaptionDataset(Dataset[Example]):
    """Validation examples: the first caption, or the first few, and a deterministic transform, so that losses can be
    compared over time. For the same reason an image that cannot be decoded is an error.
    """

    def __init__(
        self, records: Sequence[Record], transform: Transform, tokenizer: Tokenizer, captions: int = 1
    ) -> None:
        self.records = records
        self.transform = transform
        self.tokenizer = tokenizer
        self.captions = captions

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Example:
        record = self.records[i]
        images = (self._image(i), *(loaded(other, self.transform) for other in record.further))
        captions = islice(cycle(record.captions), self.captions)
        return _example(images, [*captions], record, self.tokenizer)

    def _image(self, i: int) -> Images:
        return loaded(self.records[i].image, self.transform)


def _example(images: Sequence[Images], captions: Sequence[str], record: Record, tokenizer: Tokenizer) -> Example:
    """The text is a caption; for a question, the question followed by the caption as its answer."""
    if record.question:
        texts = [tokenizer.encode_answer(record.question, caption) for caption in captions]
    else:
        texts = [(tokenizer.encode(caption), 1) for caption in captions]
    tokens, prefix_length = texts[0]
    return Example(
        images[0],
        tokens,
        str(record.id),
        prefix_length=prefix_length,
        further=tuple(images[1:]),
        further_tokens=tuple(further for further, _ in texts[1:]),
        extras={"captions": record.captions},
    )
