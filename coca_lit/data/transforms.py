"""OpenCLIP's image preprocessing without the normalisation: uint8 out, the model normalises on the device.

Evaluation goes through Pillow, so that pixels, and with them scores, equal those of `open_clip.transform` to the last
bit. Training crops are cut from decoded pixels and resized by torch, which takes a third of the time and differs by 2
of 255 at most. There is no horizontal flip, and the crop is mild (90 to 100 % of the area), because captions speak of
left and right and of things near the border.
"""

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

Transform = Callable[[Image.Image], Tensor]  # any PIL image -> (3, size, size) uint8
TrainTransform = Callable[[Tensor, random.Random], Tensor]  # (3, H, W) -> (3, size, size), both uint8

SCALE = (0.9, 1.0)  # of the image's area
RATIO = (3 / 4, 4 / 3)  # width to height
TRIES = 10


def build_transform(size: int = 224) -> Transform:
    """For evaluation: shortest side to `size`, and the centre."""
    _check(size)
    bicubic = InterpolationMode.BICUBIC
    return Compose([_to_rgb, Resize(size, interpolation=bicubic), CenterCrop(size), PILToTensor()])


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class RandomCrop:
    """For training: a random part of the image, resized to `size`."""

    def __init__(self, size: int = 224) -> None:
        _check(size)
        self.size = size

    def __call__(self, pixels: Tensor, rng: random.Random) -> Tensor:
        """pixels (3, H, W) uint8 -> (3, size, size) uint8."""
        height, width = pixels.shape[1:]
        return resized(pixels, random_box(height, width, rng), self.size)


def whole(pixels: Tensor, rng: random.Random) -> Tensor:
    """For images that are made in the right size, of which nothing may be cut away."""
    return pixels


def random_box(height: int, width: int, rng: random.Random) -> Box:
    """torchvision's `RandomResizedCrop.get_params`, step by step, without a tensor for every number: most photos take
    several tries, as a mild crop of their own shape is the only one that fits.
    """
    area, (low, high) = height * width, map(math.log, RATIO)
    for _ in range(TRIES):
        target, ratio = area * rng.uniform(*SCALE), math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(rng.randint(0, height - h), rng.randint(0, width - w), h, w)
    w, h = width, height  # none fits: the centre, as much of it as the ratio allows
    if width < min(RATIO) * height:
        h = round(width / min(RATIO))
    elif width > max(RATIO) * height:
        w = round(height * max(RATIO))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def resized(pixels: Tensor, box: Box, size: int) -> Tensor:
    """The box of pixels (3, H, W) as (3, size, size), bicubic with antialiasing as Pillow does it.

    Cut first and resized then, so that nothing from outside of the box gets into it. Scaling while the JPEG is decoded
    would be quicker for large photos but is another filter: differences of 40 and more.
    """
    top, left, height, width = box
    part = pixels[None, :, top : top + height, left : left + width]  # (1, 3, height, width)
    part = part.contiguous(memory_format=torch.channels_last)  # torch has a path of its own for it
    return interpolate(part, (size, size), mode="bicubic", antialias=True)[0]


def _check(size: int) -> None:
    if size < 1:
        raise ValueError(f"the image size must be at least 1 pixel, not {size}")


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")
