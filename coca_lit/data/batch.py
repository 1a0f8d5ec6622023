"""`Batch` is the one contract between data, LightningModule and evaluations."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coca_lit.data.bad_samples import BadSample


class Batch(NamedTuple):
    """B captioned images, or questions with an answer, or texts alone."""

    images: Tensor  # (B, 3, H, W) uint8, channels last in memory as decoders give them; normalised on the device. For
    # texts alone (0, 3, H, W); where they are cached, tokens of the image encoder, (B, S, C) fp16
    tokens: Tensor  # (B, L) int64, padded to the longest caption of the batch
    lengths: Tensor  # (B,) int64, number of real tokens including start and end
    keys: list[str]  # sample ids, for error reports
    bad: tuple[BadSample, ...] = ()  # what was left out while this batch was made
    sources: tuple[str, ...] = ()  # (B) where each sample comes from, for mixtures of several
    prefix_lengths: Tensor | None = None  # (B,) int64, leading tokens that are not predicted: start and question
    answers: tuple[tuple[str, ...], ...] = ()  # (B) all answers to each question


class Example(NamedTuple):
    """One training pair, the input of `collate`."""

    image: Tensor  # (3, H, W) uint8, or (S, C) fp16
    tokens: list[int]  # with start and end, not padded
    key: str
    bad: tuple[BadSample, ...] = ()  # what this one stands in for
    source: str = ""
    prefix_length: int = 1  # leading tokens that are not predicted: the start, and a question if there is one
    answers: tuple[str, ...] = ()  # all that the question got


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Stack examples, padding the captions only to the longest of them."""
    tokens, lengths = padded([example.tokens for example in examples], pad_id)
    images = _together([example.image for example in examples])
    bad = tuple(found for example in examples for found in example.bad)
    sources = tuple(example.source for example in examples if example.source)
    keys, answers = [example.key for example in examples], tuple(example.answers for example in examples)
    if not any(answers):
        return Batch(images, tokens, lengths, keys, bad, sources)
    prefix_lengths = torch.tensor([example.prefix_length for example in examples])  # (B,)
    return Batch(images, tokens, lengths, keys, bad, sources, prefix_lengths, answers)


def _together(images: Sequence[Tensor]) -> Tensor:
    """Pixels (B, 3, H, W) channels last, or cached tokens (B, S, C)."""
    if images[0].ndim == 2:
        return torch.stack(list(images))
    shape = (len(images), *images[0].shape)
    together = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    for place, image in zip(together, images, strict=True):
        place.copy_(image)
    return together


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, L), padded to the longest row, and lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), pad_id)
    for target, row in zip(tokens, rows, strict=True):
        target[: len(row)] = torch.tensor(row)
    return tokens, lengths
