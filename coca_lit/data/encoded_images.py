"""JPEGs that workers decode at a fraction of their size, or leave to the device of the training (`data.decode`)."""

import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from coca_lit.data.bad_samples import BadSample
from coca_lit.data.pixels import check_bytes, decode_pixels, read_jpeg
from coca_lit.data.transforms import Box, RandomCrop, as_tensor, random_box, resized
from coca_lit.errors import DataError
from coca_lit.models.inputs import Images
from coca_lit.models.packing import to_device

if TYPE_CHECKING:
    from coca_lit.data.batch import Batch

REDUCED_SIDES = 4  # a box in a JPEG decoded at a fraction of its size keeps this many times the wanted pixels
JPEG_END = b"\xff\xd9"  # its last bytes
_PLACE = re.compile(r".*\.(cpp|cu|h):\d+, ")  # the source line with which torchvision begins its messages


class EncodedCrop(NamedTuple):
    """A JPEG that is not decoded yet, and the part of it to resize to `size`."""

    content: bytes
    box: Box
    size: int
    shard: str = ""  # for error reports


class CropOfEncoded:
    """`RandomCrop` of an encoded image, with the same boxes. Other images than ordinary, upright JPEGs are decoded
    as usual.

    Args:
        decode: reduced: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the box keeps `REDUCED_SIDES` times the
            wanted pixels on each side; the edges of the box then move to the nearest remaining pixel, by at most an
            eighth of a pixel of the crop. device: a complete JPEG stays encoded, as an `EncodedCrop`.
    """

    def __init__(self, size: int, decode: Literal["reduced", "device"]) -> None:
        self.size, self.decode = size, decode

    def __call__(self, content: bytes, name: str, rng: random.Random, shard: str = "") -> Tensor | EncodedCrop:
        """(3, size, size) uint8, or an `EncodedCrop` of that size. Raises `DataError` as `decode_pixels` does."""
        check_bytes(len(content), name)
        jpeg = read_jpeg(content, name)
        if jpeg is None or not jpeg.ordinary or jpeg.orientation > 1:
            return RandomCrop(self.size)(as_tensor(decode_pixels(content, name)), rng)
        shape = (jpeg.height, jpeg.width)
        box, fraction = random_box(*shape, rng), 1
        if self.decode == "device" and content.endswith(JPEG_END):
            return EncodedCrop(jpeg.content, box, self.size, shard)
        most = min(box.height, box.width) // (REDUCED_SIDES * self.size) if self.decode == "reduced" else 1
        while fraction < 8 and 2 * fraction <= most:
            fraction *= 2
        try:
            # At least the sides that libjpeg rounds up to, so that it takes this fraction and no smaller one.
            least = [-(-side // fraction) for side in shape]
            pixels = as_tensor(simplejpeg.decode_jpeg(jpeg.content, "RGB", False, False, *least, fraction))
        except ValueError:
            pixels, fraction = as_tensor(decode_pixels(content, name)), 1
        top, left, bottom, right = (
            round(edge / fraction) for edge in (box.top, box.left, box.top + box.height, box.left + box.width)
        )
        return resized(pixels, Box(top, left, bottom - top, right - left), (self.size, self.size))


class EncodedCrops(NamedTuple):
    """The JPEGs of a batch, and the part of each that becomes the crop."""

    content: Tensor  # uint8, all files one after the other, on the host
    sizes: list[int]  # of each file in bytes
    boxes: list[Box]
    places: list[int]  # in the batch
    shards: list[str]  # that the files come from


def stack_encoded(images: Sequence[Images | EncodedCrop]) -> tuple[Tensor, EncodedCrops]:
    """The pixels (B, 3, H, W) of images that are decoded, and the others."""
    tensors = [image for image in images if isinstance(image, Tensor)]
    jpegs = {place: image for place, image in enumerate(images) if isinstance(image, EncodedCrop)}
    content = torch.frombuffer(bytearray().join(jpeg.content for jpeg in jpegs.values()), dtype=torch.uint8)
    sizes, boxes = [len(jpeg.content) for jpeg in jpegs.values()], [jpeg.box for jpeg in jpegs.values()]
    shards, size = [jpeg.shard for jpeg in jpegs.values()], next(iter(jpegs.values())).size
    others = torch.stack(tensors) if tensors else torch.empty(0, 3, size, size, dtype=torch.uint8)
    return others, EncodedCrops(content, sizes, boxes, [*jpegs], shards)


def decoded(batch: "Batch", encoded: EncodedCrops, device: torch.device) -> "Batch":
    """The batch with all images on the device, see `Batch.to`."""
    others = cast(Tensor, batch.images)
    places = range(len(batch.keys))
    height, width = others.shape[-2:]
    shape = (len(places), 3, height, width)
    images = torch.empty(shape, dtype=torch.uint8, device=device, memory_format=torch.channels_last)
    if rest := sorted(set(places).difference(encoded.places)):
        images[rest] = to_device(others, device)
    failed: dict[int, str] = {}
    pixels_of_each = _decode([*encoded.content.split(encoded.sizes)], device)
    for place, box, pixels in zip(encoded.places, encoded.boxes, pixels_of_each, strict=True):
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
