"""Map-style data sets over records: what one training or validation example is."""

import random
from collections.abc import Sequence

from torch.utils.data import Dataset

from coca_lit.data.bad_samples import BadSamples
from coca_lit.data.batch import Example
from coca_lit.data.records import MAX_MISSING, DataError, Record
from coca_lit.data.seeding import seeded_torch, stable_seed
from coca_lit.data.transforms import Transform
from coca_lit.tokenizer import Tokenizer

MAX_TRIES = 10  # one bad image is an accident, ten in a row are a broken disk


class CaptionDataset(Dataset[Example]):
    """Training examples: one caption drawn at random, a random crop.

    Indexed by (epoch, i), and both draws are keyed by (seed, epoch, record id): any worker of any rank makes the same
    example of it, before and after a resume. For an image that cannot be decoded another one stands in, drawn with the
    same key; more than `MAX_MISSING` of them stop the training, as do images that are not there at all.
    """

    def __init__(self, records: Sequence[Record], transform: Transform, tokenizer: Tokenizer, seed: int = 0):
        self.records, self.transform, self.tokenizer, self.seed = records, transform, tokenizer, seed
        self.bad = BadSamples(MAX_MISSING)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: tuple[int, int]) -> Example:
        epoch, i = index
        tries = random.Random(stable_seed("stand-in", self.seed, epoch, i))
        for _ in range(MAX_TRIES):
            self.bad.seen += 1
            try:
                return self._example(epoch, self.records[i])._replace(bad=self.bad.take())
            except DataError as error:
                self.bad.add("unreadable image", "", str(self.records[i].id), str(error))
            i = tries.randrange(len(self.records))
        raise DataError(f"no usable image in {MAX_TRIES} tries: {self.bad.summary()}")

    def _example(self, epoch: int, record: Record) -> Example:
        seed = stable_seed(self.seed, epoch, record.id)
        caption = random.Random(seed).choice(record.captions)
        with seeded_torch(seed):
            image = self.transform(record.image())
        return Example(image, self.tokenizer.encode(caption), str(record.id))


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
        return Example(self.transform(record.image()), self.tokenizer.encode(record.captions[0]), str(record.id))
