"""Images for training and for evaluation: uint8 out, the model normalises on the device.

For training, ordinary JPEGs are decoded by libjpeg-turbo straight into an array, anything else by Pillow; both give the
same pixels, as Pillow decodes JPEGs with that library too and then copies them twice. Crops are resized by torch, which
takes a third of the time and differs by 2 of 255 at most. There is no horizontal flip, and the crop is mild (90 to
100 % of the area), because captions mention left and right and things near the border.

For evaluation they go through OpenCLIP's preprocessing, in Pillow, so that pixels, and with them scores, equal
`open_clip.transform`'s to the last bit.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize
from torchvision.transforms.functional import pil_to_tensor, resize

from coca_lit.data.pixels import in_rgb, orientation_of, upright
from coca_lit.data.sources import ImageSource, TrainTransform, Transform, as_tensor
from coca_lit.errors import DataError
from coca_lit.models.config import Interpolation, ResizeMode
from coca_lit.models.inputs import Images, InputKind, preprocessing

SCALE = (0.9, 1.0)  # of the image's area
RATIO = (3 / 4, 4 / 3)  # width to height
TRIES = 10


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class RandomCrop:
    """For training: a random part of the image, resized to `size`."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, pixels: Tensor, rng: random.Random, budget: int | None = None) -> Tensor:
        """pixels (3, H, W) uint8 -> (3, size, size) uint8."""
        height, width = pixels.shape[1:]
        return resized(pixels, random_box(height, width, rng), (self.size, self.size))


def whole(pixels: Tensor, rng: random.Random, budget: int | None = None) -> Tensor:
    """No crop, for images that are made at the right size and must stay complete."""
    return pixels


def random_box(height: int, width: int, rng: random.Random, aspect: float = 1.0) -> Box:
    """torchvision's `RandomResizedCrop.get_params` without a tensor for every number: most photos take several tries,
    as only a mild crop of about their own shape fits. The box has about the aspect ratio `aspect`, width to height.
    """
    area, (low, high) = height * width, map(math.log, RATIO)
    for _ in range(TRIES):
        target = area * rng.uniform(*SCALE)
        ratio = aspect * math.exp(rng.uniform(low, high))
        w = round(math.sqrt(target * ratio))
        h = round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(rng.randint(0, height - h), rng.randint(0, width - w), h, w)
    w, h = width, height  # none fits: as much of the centre as the ratio allows
    if width < min(RATIO) * aspect * height:
        h = round(width / (min(RATIO) * aspect))
    elif width > max(RATIO) * aspect * height:
        w = round(height * max(RATIO) * aspect)
    return Box((height - h) // 2, (width - w) // 2, h, w)


def resized(pixels: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """The box of pixels (3, H, W) uint8 with another height and width, bicubic with antialiasing as Pillow does it.

    Cropping comes first, so that no pixel from outside the box contributes.
    """
    top, left, height, width = box
    part = pixels[None, :, top : top + height, left : left + width]  # (1, 3, height, width)
    part = part.contiguous(memory_format=torch.channels_last)  # torch has a fast path for it
    return interpolate(part, size, mode="bicubic", antialias=True)[0]


@contextmanager
def decoding() -> Iterator[None]:
    """Turns what Pillow raises for a broken image, which a user's own function may have opened, into a `DataError`."""
    try:
        yield
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a damaged chunk of a PNG
        raise DataError(str(error) or type(error).__name__) from error


@decoding()
def loaded(image: Callable[[], Image.Image], transform: Transform) -> Images:
    """What a model sees of the image of a record in an evaluation."""
    if isinstance(image, ImageSource):
        return image.transformed(transform)
    return transform(image())


@decoding()
def augmented(
    image: Callable[[], Image.Image], transform: TrainTransform, rng: random.Random, budget: int | None = None
) -> Images:
    """The same in training."""
    if isinstance(image, ImageSource):
        return image.augmented(transform, rng, budget)
    return transform(load_pixels(image), rng, budget)


def load_pixels(image: Callable[[], Image.Image]) -> Tensor:
    """(3, H, W) uint8 of the image of a record; a file is read without the copies that Pillow would make."""
    if isinstance(image, ImageSource):
        return image.pixels()
    return as_tensor(np.array(_to_rgb(image())))


# Evaluation


def build_transform(
    size: int = 224,
    interpolation: Interpolation = "bicubic",
    resize_mode: ResizeMode = "shortest",
    input_kind: InputKind | None = None,
) -> Transform:
    """For evaluation: photo -> (3, size, size), or an `Input`. `build_transform(**model.preprocessing)` is that of a
    model.

    Args:
        resize_mode: shortest: the shorter side becomes `size`, and the centre is kept. longest: the longer side becomes
            `size`, and the rest is black. squash: both sides become `size`.
        input_kind: what the image encoder takes in place of squares; `size` and `resize_mode` then have no effect.
    """
    if size < 1:
        raise ValueError(f"the image size must be at least 1 pixel, not {size}")
    preprocessing(size, interpolation, resize_mode)
    mode = InterpolationMode(interpolation)
    if input_kind is not None:
        return Compose([_to_rgb, partial(input_kind.transformed, interpolation=interpolation)])
    if resize_mode == "longest":
        return Compose([_to_rgb, Letterbox(size, mode)])
    if resize_mode == "squash":
        return Compose([_to_rgb, Resize((size, size), interpolation=mode), PILToTensor()])
    return Compose([_to_rgb, Resize(size, interpolation=mode), CenterCrop(size), PILToTensor()])


class Letterbox:
    """The whole photo in the middle of a black square."""

    def __init__(self, size: int, interpolation: InterpolationMode) -> None:
        self.size = size
        self.interpolation = interpolation

    def __repr__(self) -> str:
        return f"Letterbox({self.size}, {self.interpolation})"

    def __call__(self, image: Image.Image) -> Tensor:
        ratio = max(image.size) / self.size
        height, width = (max(round(side / ratio), 1) for side in (image.height, image.width))
        part = pil_to_tensor(resize(image, [height, width], self.interpolation))
        pixels = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        top = (self.size - height) // 2
        left = (self.size - width) // 2
        pixels[:, top : top + height, left : left + width] = part
        return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    """Upright as all images are, see `coca_lit.data.pixels`; one that was decoded there has no EXIF data."""
    rgb = in_rgb(image)
    orientation = orientation_of(image.info.get("exif", b""))
    return rgb if orientation == 1 else Image.fromarray(upright(np.asarray(rgb), orientation))
