"""`Batch` is the contract between data, LightningModule and evaluations."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import default_collate

from coca_lit.data.bad_samples import BadSample
from coca_lit.errors import DataError
from coca_lit.models.inputs import Images, Patches, stack_images
from coca_lit.models.packing import to_device

if TYPE_CHECKING:
    from coca_lit.losses.distillation import Teacher


class Batch(NamedTuple):
    """B captioned images, or questions with an answer, or texts alone. With n images per sample, `images` has n * B
    rows, with the images of a sample next to each other.
    """

    images: Images  # (B, 3, H, W) uint8, channels last in memory as decoders return them, normalised on the device;
    # clips (B, F, 3, H, W); or `Patches`, padded to the longest image; (0, 3, H, W) for texts alone; cached features
    # of the image encoder are (B, S, C) fp16
    tokens: Tensor  # (B, L) int64, padded to the longest caption of the batch
    lengths: Tensor  # (B,) int64, number of real tokens including start and end; on the host, see `to`
    keys: list[str]  # sample ids, for error reports
    bad: tuple[BadSample, ...] = ()  # skipped while this batch was made
    sources: tuple[str, ...] = ()  # (B) the source of each sample in a mixture
    prefix_lengths: Tensor | None = None  # (B,) int64, leading tokens that are not predicted: start and question
    answers: tuple[tuple[str, ...], ...] = ()  # (B) all captions of each record: the answers, or the label
    teachers: "tuple[Teacher, ...]" = ()  # what each of them says of these crops and texts, fp16

    def to(self, device: torch.device) -> "Batch":
        """With images and tokens on the device. Lengths stay on the host, where the layout of the texts is computed:
        to read them from a GPU, the host would wait for it.
        """
        images = self.images
        if isinstance(images, Patches):
            images = replace(images, rows=to_device(images.rows, device))
        else:
            images = to_device(images, device)
        teachers = tuple(
            known._replace(images=to_device(known.images, device), texts=to_device(known.texts, device))
            for known in self.teachers
        )
        return self._replace(images=images, tokens=to_device(self.tokens, device), teachers=teachers)


class Example(NamedTuple):
    """One training pair, the input of `collate`."""

    image: Images  # (3, H, W) uint8, (F, 3, H, W) of a clip, or `Patches`, or (S, C) fp16
    tokens: list[int]  # with start and end, not padded
    key: str
    bad: tuple[BadSample, ...] = ()  # samples that this one replaces
    source: str = ""
    prefix_length: int = 1  # leading tokens that are not predicted: the start, and a question if there is one
    answers: tuple[str, ...] = ()  # all captions of the record
    further: tuple[Images, ...] = ()  # images after the first one
    teachers: "tuple[Teacher, ...]" = ()  # what each says of this crop and text, (E,) each


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Stack examples, padding the captions only to the longest of them. Raises `DataError` if some have more images
    than others.
    """
    counts = sorted({1 + len(example.further) for example in examples})
    if len(counts) > 1:
        raise DataError(f"samples of a batch have {counts[0]} and {counts[-1]} images: all records need equally many")
    tokens, lengths = padded([example.tokens for example in examples], pad_id)
    images = _stack([image for example in examples for image in (example.image, *example.further)])
    bad = tuple(found for example in examples for found in example.bad)
    sources = tuple(example.source for example in examples if example.source)
    keys, answers = [example.key for example in examples], tuple(example.answers for example in examples)
    prefix_lengths: Tensor | None = None
    if any(example.prefix_length > 1 for example in examples):
        prefix_lengths = torch.tensor([example.prefix_length for example in examples])  # (B,)
    teachers: list[Teacher] = []
    for rows in zip(*(example.teachers for example in examples), strict=True):
        vectors, texts = (torch.stack(found) for found in zip(*(row[:2] for row in rows), strict=True))  # (B, E)
        teachers.append(rows[0]._replace(images=vectors, texts=texts))
    return Batch(images, tokens, lengths, keys, bad, sources, prefix_lengths, answers, tuple(teachers))


def _stack(images: Sequence[Images]) -> Images:
    """Pixels (B, 3, H, W) channels last, clips (B, F, 3, H, W), `Patches`, or cached features (B, S, C). A worker
    writes pixels and features into memory that the training process shares, which saves a copy.
    """
    if isinstance(images[0], Patches):
        return stack_images(images)
    tensors = cast(Sequence[Tensor], images)
    if len({tensor.shape for tensor in tensors if tensor.ndim == 4} | {tensors[0].shape}) > 1:
        raise DataError("images and clips, or clips of several numbers of frames, are in one batch: train on one kind")
    if tensors[0].ndim != 3:
        return default_collate([*tensors])
    return default_collate([image.permute(1, 2, 0) for image in tensors]).permute(0, 3, 1, 2)


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, L), padded to the longest row, and lengths (B,)."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    tokens = [[*row, *[pad_id] * (longest - len(row))] for row in rows]
    return torch.tensor(tokens), torch.tensor(lengths)
