"""`Batch` is the contract between data, LightningModule and evaluations."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import default_collate

from coca_lit.data.bad_samples import BadSample
from coca_lit.errors import DataError
from coca_lit.models.inputs import Images, Input, stack_images
from coca_lit.models.packing import to_device


class Batch(NamedTuple):
    """B captioned images, or questions with an answer, or what else a `BatchSchedule` gives. With n images per sample,
    `images` has n * B rows, with the images of a sample next to each other.

    `extras` holds what only some objectives and callbacks read, by name: tensors of B rows, or lists of B values, such
    as texts. The readers of data fill in

    - "captions", of records: all captions of each as a tuple; of a question its answers, of a statement its label
    - "source", of mixtures: the name of the source of each sample
    - "further_tokens" (B, K - 1, L) and "further_lengths" (B, K - 1), with K captions of each image (`data.captions`):
      those besides the one in `tokens`, padded to the longest of them
    """

    images: Images  # (B, 3, H, W) uint8, channels last in memory as decoders return them, normalised on the device;
    # or an `Input`; (0, 3, H, W) in a batch without images; cached features of the image encoder are (B, S, C) fp16
    tokens: Tensor  # (B, L) int64, padded to the longest caption of the batch
    lengths: Tensor  # (B,) int64, number of real tokens including start and end; on the host, see `to`
    keys: list[str]  # sample ids, for error reports
    bad: tuple[BadSample, ...] = ()  # skipped while this batch was made
    prefix_lengths: Tensor | None = None  # (B,) int64, leading tokens that are not predicted: start and question
    extras: Mapping[str, Any] = {}

    def to(self, device: torch.device) -> "Batch":
        """With images, tokens and the tensors of `extras` on the device. Lengths, and extras whose name ends in that
        word, stay on the host, where the layout of the texts is computed: to read them from a GPU, the host would wait
        for it.
        """
        if isinstance(self.images, Input):
            images: Images = self.images.to(device, non_blocking=True)
        else:
            images = to_device(self.images, device)
        extras = dict(self.extras)
        for name, values in self.extras.items():
            if isinstance(values, Tensor) and not name.endswith("lengths"):
                extras[name] = to_device(values, device)
        return self._replace(images=images, tokens=to_device(self.tokens, device), extras=extras)

    def rows(self, start: int, end: int) -> "Batch":
        """Some of its samples, each with one image."""
        return self._replace(
            images=self.images[start:end],
            tokens=self.tokens[start:end],
            lengths=self.lengths[start:end],
            keys=self.keys[start:end],
            prefix_lengths=None if self.prefix_lengths is None else self.prefix_lengths[start:end],
            extras={name: values[start:end] for name, values in self.extras.items()},
        )


class Example(NamedTuple):
    """One training pair, the input of `collate`."""

    image: Images  # (3, H, W) uint8, or a single `Input`, or (S, C) fp16
    tokens: list[int]  # with start and end, not padded
    key: str
    bad: tuple[BadSample, ...] = ()  # samples that this one replaces
    prefix_length: int = 1  # leading tokens that are not predicted: the start, and a question if there is one
    further: tuple[Images, ...] = ()  # images after the first one
    further_tokens: tuple[list[int], ...] = ()  # of further captions, each with start and end
    extras: Mapping[str, Any] = {}  # tensors, which all samples of a batch have in the same shape, or other values


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Stack examples, padding the captions only to the longest of them. Raises `DataError` if some have more images, or
    other extras, than others.
    """
    counts = sorted({1 + len(example.further) for example in examples})
    if len(counts) > 1:
        raise DataError(f"samples of a batch have {counts[0]} and {counts[-1]} images: all records need equally many")
    tokens, lengths = padded([example.tokens for example in examples], pad_id)
    images = _stack([image for example in examples for image in (example.image, *example.further)])
    bad = tuple(found for example in examples for found in example.bad)
    keys = [example.key for example in examples]
    prefix_lengths: Tensor | None = None
    if any(example.prefix_length > 1 for example in examples):
        prefix_lengths = torch.tensor([example.prefix_length for example in examples])  # (B,)
    extras = _stack_extras([example.extras for example in examples])
    if examples[0].further_tokens:
        rows = [row for example in examples for row in example.further_tokens]
        further_tokens, further_lengths = padded(rows, pad_id)
        extras["further_tokens"] = further_tokens.unflatten(0, (len(examples), -1))
        extras["further_lengths"] = further_lengths.unflatten(0, (len(examples), -1))
    return Batch(images, tokens, lengths, keys, bad, prefix_lengths, extras)


def _stack_extras(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = samples[0].keys()
    other = next((sample.keys() for sample in samples if sample.keys() != names), None)
    if other is not None:
        raise DataError(f"samples of a batch have the extras {sorted(names)} and {sorted(other)}: give all the same")
    extras: dict[str, Any] = {}
    for name in names:
        values = [sample[name] for sample in samples]
        extras[name] = torch.stack(values) if isinstance(values[0], Tensor) else values
    return extras


def _stack(images: Sequence[Images]) -> Images:
    """Pixels (B, 3, H, W) channels last, an `Input`, or cached features (B, S, C). A worker writes pixels and features
    into memory that the training process shares, which saves a copy.
    """
    if any(isinstance(image, Input) for image in images):
        return stack_images(images)
    tensors = cast(Sequence[Tensor], images)
    if tensors[0].ndim != 3:
        return default_collate([*tensors])
    return default_collate([image.permute(1, 2, 0) for image in tensors]).permute(0, 3, 1, 2)


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, L), padded to the longest row, and lengths (B,)."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    tokens = [[*row, *[pad_id] * (longest - len(row))] for row in rows]
    return torch.tensor(tokens), torch.tensor(lengths)
