"""Texts without images, to train the decoder alone: batches of texts between the batches of pairs.

A batch is a function of its number alone, so that a resumed run needs only the trainer's position.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import count
from typing import Any

import torch

from coca_lit.data.batch import Batch, padded
from coca_lit.data.batch_schedule import BatchSchedule
from coca_lit.data.datamodule import described_change
from coca_lit.data.loader import Schedule, ShuffledBatches
from coca_lit.data.mixture import Source
from coca_lit.distributed import stable_seed
from coca_lit.errors import DataError, whole_number
from coca_lit.projects.texts.files import TextFiles, read_texts
from coca_lit.projects.texts.objective import TextLoss
from coca_lit.tokenizer import Tokenizer


class TextBatches:
    """Batches of texts alone, in a different order in every pass.

    Args:
        files: see `read_texts`; the texts are kept in memory.
        batch_size: of all processes together.
        image_size: of the model, for the shape of the empty tensor of images.
    """

    def __init__(self, files: TextFiles, tokenizer: Tokenizer, batch_size: int, image_size: int, seed: int = 0) -> None:
        self.files = files
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.image_size = image_size
        self.seed = seed
        self._orders: dict[tuple[int, int], ShuffledBatches] = {}  # of each rank that was asked for

    @cached_property
    def texts(self) -> list[str]:
        texts = read_texts(self.files)
        if len(texts) < self.batch_size:
            raise DataError(f"data.text holds {len(texts)} texts, less than one batch of {self.batch_size}")
        return texts

    @cached_property
    def digest(self) -> int:
        return stable_seed(*self.texts)

    def __len__(self) -> int:
        """Batches of one pass."""
        return len(self.texts) // self.batch_size

    def batch(self, number: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's part of global batch `number`, counted over all passes."""
        if (rank, world) not in self._orders:
            schedule = Schedule(len(self.texts), self.batch_size)
            source = Source("", len(self.texts))
            order = ShuffledBatches([source], schedule, self.seed, 0, None, rank, world, by_epoch=True)
            self._orders[rank, world] = order
        indices = [index.i for index in self._orders[rank, world].part(number)]
        rows = self.tokenizer.encode_batch([self.texts[i] for i in indices])
        tokens, lengths = padded(rows, self.tokenizer.pad_id)
        images = torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8)
        return Batch(images, tokens, lengths, [f"text {i}" for i in indices])


class TextsBetweenPairs(BatchSchedule):
    """At every N-th step a batch of texts alone, at the others the next batch of pairs.

    Args:
        text: files of texts without images, see `read_texts`.
        text_every: every N-th batch has texts without images; 1 for all, then an epoch is one pass over them.
        text_weight: factor of the caption loss on batches of texts without images.
        label_smoothing: in this loss, as in that of pairs, the share of every target that is spread over the vocabulary
            in training.
    """

    _texts: TextBatches

    def __init__(
        self, text: TextFiles, text_every: int = 2, text_weight: float = 1.0, label_smoothing: float = 0.0
    ) -> None:
        self.files = text
        self.every = whole_number("text_every", text_every, at_least=1)
        self.objectives = [TextLoss(text_weight, label_smoothing)]

    def begin(self, tokenizer: Tokenizer, batch_size: int, image_size: int, seed: int) -> None:
        self._texts = TextBatches(self.files, tokenizer, batch_size, image_size, seed)

    def prepare(self) -> None:
        _ = self._texts.texts

    def steps(self, pairs: int) -> int:
        return len(self._texts) if self.every == 1 else pairs + pairs // (self.every - 1)

    def batches(
        self,
        pairs_from: Callable[[int, int], Iterable[Batch]],
        pairs: int,
        rank: int,
        world: int,
        epoch: int,
        start: int,
    ) -> Iterator[Batch]:
        images = iter(pairs_from(epoch, start - start // self.every)) if self.every > 1 else iter(())
        before = epoch * (self.steps(pairs) // self.every)  # batches of texts in earlier epochs
        for step in count(start):
            is_text = (step + 1) % self.every == 0
            yield self._texts.batch(before + step // self.every, rank, world) if is_text else next(images)

    def state_dict(self) -> dict[str, Any]:
        return {"texts": len(self._texts.texts), "digest of texts": self._texts.digest}

    def changed_since(self, state: Mapping[str, Any]) -> str:
        return described_change("texts", state, self.state_dict())
