"""`Batch` is the one contract between data, LightningModule and evaluations."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coca_lit.data.bad_samples import BadSample


class Batch(NamedTuple):
    """B captioned images."""

    images: Tensor  # (B, 3, H, W) uint8, channels last in memory as decoders give them; normalised on the device
    tokens: Tensor  # (B, L) int64, padded to the longest caption of the batch
    lengths: Tensor  # (B,) int64, number of real tokens including start and end
    keys: list[str]  # sample ids, for error reports
    bad: tuple[BadSample, ...] = ()  # what was left out while this batch was made
    sources: tuple[str, ...] = ()  # (B) where each sample comes from, for mixtures of several


class Example(NamedTuple):
    """One training pair, the input of `collate`."""

    image: Tensor  # (3, H, W) uint8
    tokens: list[int]  # with start and end, not padded
    key: str
    bad: tuple[BadSample, ...] = ()  # what this one stands in for
    source: str = ""


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Stack examples, padding the captions only to the longest of them."""
    lengths = torch.tensor([len(example.tokens) for example in examples])  # (B,)
    tokens = torch.full((len(examples), int(lengths.max())), pad_id)  # (B, L)
    for row, example in zip(tokens, examples, strict=True):
        row[: len(example.tokens)] = torch.tensor(example.tokens)
    shape = (len(examples), *examples[0].image.shape)  # (B, 3, H, W)
    images = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    for place, example in zip(images, examples, strict=True):
        place.copy_(example.image)
    bad = tuple(found for example in examples for found in example.bad)
    sources = tuple(example.source for example in examples if example.source)
    return Batch(images, tokens, lengths, [example.key for example in examples], bad, sources)
