"""Texts without images, to train the decoder alone: batches of texts between batches of captioned images.

A batch is a function of its number alone, so that a resumed run needs only the trainer's position.
"""

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from io import TextIOWrapper
from itertools import count
from pathlib import Path
from typing import Any

import torch

from coca_lit.data.batch import Batch, padded
from coca_lit.data.datasets.annotations import read_references
from coca_lit.data.loader import Schedule, ShuffledBatches
from coca_lit.data.mixture import Source
from coca_lit.data.records import clean_captions, not_found
from coca_lit.distributed import stable_seed
from coca_lit.errors import DataError
from coca_lit.reading import encoding_of, open_regular, parse_json, printable
from coca_lit.tokenizer import Tokenizer

TextFiles = str | Sequence[str]


def read_texts(files: TextFiles) -> list[str]:
    """All texts of some files, in the order of the files.

    Args:
        files: paths or patterns. NAME.txt holds one text per line; NAME.jsonl a JSON text, or an object with "text" or
            "caption", per line; NAME.json and NAME.json.gz hold captions in the schema of COCO or Karpathy, of which
            the training split is taken.

    Raises:
        DataError: a pattern matches nothing, a file is none of these, or there are no texts at all.
    """
    patterns = [files] if isinstance(files, str) else list(files)
    texts: list[str] = []
    for pattern in patterns:
        paths = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise not_found("texts", [pattern], "data.text takes .txt, .jsonl and caption files, or patterns of them")
        for path in map(Path, paths):
            if path.suffix == ".json" or path.name.endswith(".json.gz"):
                for item in read_references(path, "train"):
                    texts += clean_captions(item.captions)
                continue
            if path.suffix not in (".txt", ".jsonl"):
                raise DataError(f"{path} is neither a .txt, a .jsonl nor a caption file (.json, .json.gz)")
            try:
                with open_regular(path) as file:
                    text = TextIOWrapper(file, encoding_of(file.peek(2)), errors="replace", newline="\n")
                    lines = [line for line in map(str.strip, text) if line]
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror or error}") from error
            rows = lines if path.suffix == ".txt" else (_text(path, *row) for row in enumerate(lines, start=1))
            texts += clean_captions(rows)
    if not texts:
        raise DataError(f"{', '.join(patterns)} hold no text")
    return texts


def _text(path: Path, number: int, line: str) -> str:
    try:
        content: Any = parse_json(line, "it")
    except DataError as error:
        raise DataError(f"{path}, text {number} is not JSON: {error}") from error
    text = content.get("text", content.get("caption")) if isinstance(content, dict) else content
    if not isinstance(text, str):
        raise DataError(
            f'{path}, text {number}: expected a text, or an object with "text" or "caption", got {printable(line[:80])}'
        )
    return text


class TextBatches:
    """Batches of texts alone, in a different order in every pass.

    Args:
        files: see `read_texts`; the texts are kept in memory.
        batch_size: of all processes together.
        image_size: of the model, for the shape of the empty tensor of images.
    """

    def __init__(self, files: TextFiles, tokenizer: Tokenizer, batch_size: int, image_size: int, seed: int = 0) -> None:
        self.files, self.tokenizer, self.batch_size = files, tokenizer, batch_size
        self.image_size, self.seed = image_size, seed
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
            schedule, source = Schedule(len(self.texts), self.batch_size), Source("", len(self.texts))
            order = ShuffledBatches([source], schedule, self.seed, 0, None, rank, world, by_epoch=True)
            self._orders[rank, world] = order
        indices = [index.i for index in self._orders[rank, world].part(number)]
        rows = self.tokenizer.encode_batch([self.texts[i] for i in indices])
        tokens, lengths = padded(rows, self.tokenizer.pad_id)
        images = torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8)
        return Batch(images, tokens, lengths, [f"text {i}" for i in indices])

    def steps(self, pairs: int, every: int) -> int:
        """Batches of an epoch with `pairs` batches of captioned images and one of texts at every `every`-th step. With
        1 all batches are texts, and an epoch is one pass over them.
        """
        return len(self) if every == 1 else pairs + pairs // (every - 1)

    def between(
        self,
        pairs_from: Callable[[int, int], Iterable[Batch]],
        pairs: int,
        every: int,
        epoch: int,
        start: int,
        rank: int,
        world: int,
    ) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on, see `steps`."""
        images = iter(pairs_from(epoch, start - start // every)) if every > 1 else iter(())
        before = epoch * (self.steps(pairs, every) // every)  # batches of texts in earlier epochs
        for step in count(start):
            is_text = (step + 1) % every == 0
            yield self.batch(before + step // every, rank, world) if is_text else next(images)
