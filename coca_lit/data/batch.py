"""`Batch` is the contract between data, LightningModule and evaluations."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.io import ImageReadMode, decode_jpeg

from coca_lit.data.bad_samples import BadSample
from coca_lit.data.transforms import Box, EncodedCrop, resized
from coca_lit.errors import DataError
from coca_lit.models.packing import to_device
from coca_lit.models.patches import Images, Patches, stack_images

_PLACE = re.compile(r".*\.(cpp|cu|h):\d+, ")  # the source line with which torchvision begins its messages


class EncodedCrops(NamedTuple):
    """The JPEGs of a batch, and the part of each that becomes the crop."""

    content: Tensor  # uint8, all files one after the other, on the host
    sizes: list[int]  # of each file in bytes
    boxes: list[Box]
    places: list[int]  # in the batch
    shards: list[str]  # that the files come from


class Batch(NamedTuple):
    """B captioned images, or questions with an answer, or texts alone."""

    images: Images  # (B, 3, H, W) uint8, channels last in memory as decoders return them, normalised on the device;
    # or `Patches`, padded to the longest image; (0, 3, H, W) for texts alone; cached features of the image encoder are
    # (B, S, C) fp16
    tokens: Tensor  # (B, L) int64, padded to the longest caption of the batch
    lengths: Tensor  # (B,) int64, number of real tokens including start and end; on the host, see `to`
    keys: list[str]  # sample ids, for error reports
    bad: tuple[BadSample, ...] = ()  # skipped while this batch was made
    sources: tuple[str, ...] = ()  # (B) the source of each sample in a mixture
    prefix_lengths: Tensor | None = None  # (B,) int64, leading tokens that are not predicted: start and question
    answers: tuple[tuple[str, ...], ...] = ()  # (B) all answers to each question
    encoded: EncodedCrops | None = None  # images that `to` decodes on the device; `images` then holds only the others

    def to(self, device: torch.device) -> "Batch":
        """With images and tokens on the device. Lengths stay on the host, where the layout of the texts is computed:
        to read them from a GPU, the host would wait for it. Encoded images are decoded on the device. Another pair of
        the batch replaces one that cannot be decoded, which is listed in `bad`; raises `DataError` if none can be.
        """
        if self.encoded is not None:
            return _decoded(self, self.encoded, device).to(device)
        images = self.images
        if isinstance(images, Patches):
            images = replace(images, rows=to_device(images.rows, device))
        else:
            images = to_device(images, device)
        return self._replace(images=images, tokens=to_device(self.tokens, device))


class Example(NamedTuple):
    """One training pair, the input of `collate`."""

    image: Images | EncodedCrop  # (3, H, W) uint8, or `Patches`, or (S, C) fp16
    tokens: list[int]  # with start and end, not padded
    key: str
    bad: tuple[BadSample, ...] = ()  # samples that this one replaces
    source: str = ""
    prefix_length: int = 1  # leading tokens that are not predicted: the start, and a question if there is one
    answers: tuple[str, ...] = ()  # all answers to the question


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Stack examples, padding the captions only to the longest of them."""
    tokens, lengths = padded([example.tokens for example in examples], pad_id)
    images, encoded = _stack([example.image for example in examples])
    bad = tuple(found for example in examples for found in example.bad)
    sources = tuple(example.source for example in examples if example.source)
    keys, answers = [example.key for example in examples], tuple(example.answers for example in examples)
    if not any(answers):
        return Batch(images, tokens, lengths, keys, bad, sources, encoded=encoded)
    prefix_lengths = torch.tensor([example.prefix_length for example in examples])  # (B,)
    return Batch(images, tokens, lengths, keys, bad, sources, prefix_lengths, answers, encoded)


def _stack(images: Sequence[Images | EncodedCrop]) -> tuple[Images, EncodedCrops | None]:
    """Pixels (B, 3, H, W) channels last, `Patches`, or cached features (B, S, C); and JPEGs that are still encoded. A
    worker writes pixels and features into memory that the training process shares, which saves a copy.
    """
    tensors = [image for image in images if isinstance(image, Tensor)]
    if jpegs := {place: image for place, image in enumerate(images) if isinstance(image, EncodedCrop)}:
        content = torch.frombuffer(bytearray().join(jpeg.content for jpeg in jpegs.values()), dtype=torch.uint8)
        sizes, boxes = [len(jpeg.content) for jpeg in jpegs.values()], [jpeg.box for jpeg in jpegs.values()]
        shards, size = [jpeg.shard for jpeg in jpegs.values()], next(iter(jpegs.values())).size
        others = torch.stack(tensors) if tensors else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return others, EncodedCrops(content, sizes, boxes, [*jpegs], shards)
    if not tensors:
        return stack_images(cast(Sequence[Patches], images)), None
    if tensors[0].ndim == 2:
        return default_collate(tensors), None
    return default_collate([image.permute(1, 2, 0) for image in tensors]).permute(0, 3, 1, 2), None


def _decoded(batch: Batch, encoded: EncodedCrops, device: torch.device) -> Batch:
    """The batch with all images on the device."""
    others = cast(Tensor, batch.images)
    places = range(len(batch.keys))
    height, width = others.shape[-2:]
    shape = (len(places), 3, height, width)
    images = torch.empty(shape, dtype=torch.uint8, device=device, memory_format=torch.channels_last)
    if rest := sorted(set(places).difference(encoded.places)):
        images[rest] = to_device(others, device)
    failed: dict[int, str] = {}
    decoded = _decode([*encoded.content.split(encoded.sizes)], device)
    for place, box, pixels in zip(encoded.places, encoded.boxes, decoded, strict=True):
        if isinstance(pixels, str):
            failed[place] = pixels
        else:
            images[place] = resized(pixels, box, (height, width))
    batch = batch._replace(images=images, encoded=None)
    if not failed:
        return batch
    good = [place for place in places if place not in failed]
    if not good:
        place, detail = next(iter(failed.items()))
        raise DataError(
            f"no image of a batch can be decoded on {device}, e.g. {batch.keys[place]}: {detail}; set data.decode=full"
        )
    take = [good[place % len(good)] if place in failed else place for place in places]
    shards = dict(zip(encoded.places, encoded.shards, strict=True))
    bad = (
        BadSample(shards[place], batch.keys[place].removeprefix(f"{shards[place]}/"), "unreadable image", why)
        for place, why in failed.items()
    )
    return batch._replace(
        images=images[take],
        tokens=batch.tokens[take],
        lengths=batch.lengths[take],
        keys=[batch.keys[place] for place in take],
        bad=(*batch.bad, *bad),
        sources=tuple(batch.sources[place] for place in take) if batch.sources else (),
    )


def _decode(jpegs: list[Tensor], device: torch.device) -> list[Tensor | str]:
    """The pixels (3, H, W) of each file, or what is wrong with it."""
    try:
        return decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # at least one is damaged; the error does not tell which
        if len(jpegs) == 1:
            return [_PLACE.sub("", str(error).splitlines()[0])]
        return [found for jpeg in jpegs for found in _decode([jpeg], device)]


def check_decoder(device: torch.device) -> None:
    """Raises `DataError` if this torchvision does not decode JPEGs on the device."""
    jpeg = torch.frombuffer(bytearray(simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8))), dtype=torch.uint8)
    (found,) = _decode([jpeg], device)
    if isinstance(found, str) or found.device.type != device.type:
        why = f": {found}" if isinstance(found, str) else ""
        raise DataError(f"this torchvision does not decode JPEGs on {device}{why}; set data.decode=full")


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, L), padded to the longest row, and lengths (B,)."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    tokens = [[*row, *[pad_id] * (longest - len(row))] for row in rows]
    return torch.tensor(tokens), torch.tensor(lengths)
