"""OpenCLIP's image preprocessing without the normalisation: uint8 out, the model normalises on the device. Models for
images of any shape get `Patches`: a photo keeps its aspect ratio and becomes as many patches as its budget allows.

Evaluation goes through Pillow, so that pixels, and with them scores, equal `open_clip.transform`'s to the last bit.
For training, ordinary JPEGs are decoded by libjpeg-turbo straight into an array, anything else by Pillow; both give
the same pixels, as Pillow decodes JPEGs with that library too and then copies them twice. Training crops are
resized by torch, which takes a third of the time and differs by 2 of 255 at most. There is no horizontal flip, and the
crop is mild (90 to 100 % of the area), because captions mention left and right and things near the border.
"""

import math
import random
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from timm.data.naflex_transforms import get_image_size_for_seq
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize
from torchvision.transforms.functional import pil_to_tensor, resize

from coca_lit.data.records import MAX_IMAGE, ImageFile, check_bytes, check_shape, decode_image
from coca_lit.errors import DataError
from coca_lit.models.patches import Images, Patches
from coca_lit.models.preprocessing import Interpolation, ResizeMode, preprocessing
from coca_lit.reading import open_regular

Transform = Callable[[Image.Image], Images]  # any PIL image -> (3, size, size) uint8, or patches
TrainTransform = Callable[..., Images]  # (3, H, W) uint8, random.Random and for patches their number -> the same

SCALE = (0.9, 1.0)  # of the image's area
RATIO = (3 / 4, 4 / 3)  # width to height
TRIES = 10
JPEG, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"  # the first and the last bytes of one
REDUCED_SIDES = 4  # a box in a JPEG decoded at a fraction of its size keeps this many times the wanted pixels


def build_transform(
    size: int = 224,
    interpolation: Interpolation = "bicubic",
    resize_mode: ResizeMode = "shortest",
    patch_size: int | None = None,
    max_patches: int | None = None,
) -> Transform:
    """For evaluation: photo -> (3, size, size), or `Patches`. `build_transform(**model.preprocessing)` is that of a
    model.

    Args:
        resize_mode: shortest: the shorter side becomes `size`, and the centre is kept. longest: the longer side becomes
            `size`, and the rest is black. squash: both sides become `size`.
        patch_size, max_patches: the whole photo in its own shape, in at most `max_patches` patches; `size` and
            `resize_mode` then have no effect.
    """
    _check(size)
    preprocessing(size, interpolation, resize_mode)
    mode = InterpolationMode(interpolation)
    if patch_size is not None and max_patches is not None:
        return Compose([_to_rgb, ToPatches(patch_size, max_patches, mode)])
    if resize_mode == "longest":
        return Compose([_to_rgb, Letterbox(size, mode)])
    if resize_mode == "squash":
        return Compose([_to_rgb, Resize((size, size), interpolation=mode), PILToTensor()])
    return Compose([_to_rgb, Resize(size, interpolation=mode), CenterCrop(size), PILToTensor()])


class Letterbox:
    """The whole photo in the middle of a black square."""

    def __init__(self, size: int, interpolation: InterpolationMode) -> None:
        self.size, self.interpolation = size, interpolation

    def __repr__(self) -> str:
        return f"Letterbox({self.size}, {self.interpolation})"

    def __call__(self, image: Image.Image) -> Tensor:
        ratio = max(image.size) / self.size
        height, width = (max(round(side / ratio), 1) for side in (image.height, image.width))
        part = pil_to_tensor(resize(image, [height, width], self.interpolation))
        pixels = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        top, left = (self.size - height) // 2, (self.size - width) // 2
        pixels[:, top : top + height, left : left + width] = part
        return pixels


class ToPatches:
    """The whole photo in its own shape, see `patch_grid`."""

    def __init__(self, patch_size: int, max_patches: int, interpolation: InterpolationMode) -> None:
        self.patch_size, self.max_patches, self.interpolation = patch_size, max_patches, interpolation

    def __repr__(self) -> str:
        return f"ToPatches({self.patch_size}, {self.max_patches}, {self.interpolation})"

    def __call__(self, image: Image.Image) -> Patches:
        height_width = patch_grid(image.height, image.width, self.patch_size, self.max_patches)
        return Patches.of(pil_to_tensor(resize(image, list(height_width), self.interpolation)), self.patch_size)


def patch_grid(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """The height and width in pixels, multiples of the patch size, to which OpenCLIP resizes an image directly: the
    largest of at most `max_patches` patches that has its aspect ratio, up to a patch; sides grow 100 times at most.
    """
    _, size = get_image_size_for_seq((height, width), patch_size, max_patches)
    return size


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
        return resized(pixels, random_box(height, width, rng), (self.size, self.size))


class EncodedCrop(NamedTuple):
    """A JPEG that is not decoded yet, and the part of it to resize to `size`."""

    content: bytes
    box: Box
    size: int
    shard: str = ""  # for error reports


class CropOfEncoded:
    """`RandomCrop` of an encoded image, with the same boxes. Images other than ordinary JPEGs are decoded as usual.

    Args:
        decode: reduced: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the box keeps `REDUCED_SIDES` times the
            wanted pixels on each side; the edges of the box then move to the nearest remaining pixel, by at most an
            eighth of a pixel of the crop. device: a complete JPEG stays encoded, as an `EncodedCrop`.
    """

    def __init__(self, size: int, decode: Literal["reduced", "device"]) -> None:
        _check(size)
        self.size, self.decode = size, decode

    def __call__(self, content: bytes, name: str, rng: random.Random) -> Tensor | EncodedCrop:
        """(3, size, size) uint8, or an `EncodedCrop` of that size. Raises `DataError` as `decode_pixels` does."""
        check_bytes(len(content), name)
        shape = _jpeg_shape(content, name)
        if shape is None:
            return RandomCrop(self.size)(decode_pixels(content, name), rng)
        box, fraction = random_box(*shape, rng), 1
        if self.decode == "device" and content.endswith(JPEG_END):
            return EncodedCrop(content, box, self.size)
        most = min(box.height, box.width) // (REDUCED_SIDES * self.size) if self.decode == "reduced" else 1
        while fraction < 8 and 2 * fraction <= most:
            fraction *= 2
        try:
            # At least the sides that libjpeg rounds up to, so that it takes this fraction and no smaller one.
            least = [-(-side // fraction) for side in shape]
            pixels = _as_tensor(simplejpeg.decode_jpeg(content, "RGB", False, False, *least, fraction))
        except ValueError:
            pixels, fraction = decode_pixels(content, name), 1
        top, left, bottom, right = (
            round(edge / fraction) for edge in (box.top, box.left, box.top + box.height, box.left + box.width)
        )
        return resized(pixels, Box(top, left, bottom - top, right - left), (self.size, self.size))


def whole(pixels: Tensor, rng: random.Random) -> Tensor:
    """No crop, for images that are made at the right size and must stay complete."""
    return pixels


def whole_box(height: int, width: int, rng: random.Random, aspect: float = 1.0) -> Box:
    return Box(0, 0, height, width)


def random_box(height: int, width: int, rng: random.Random, aspect: float = 1.0) -> Box:
    """torchvision's `RandomResizedCrop.get_params` without a tensor for every number: most photos take several tries,
    as only a mild crop of about their own shape fits. The box has about the aspect ratio `aspect`, width to height.
    """
    area, (low, high) = height * width, map(math.log, RATIO)
    for _ in range(TRIES):
        target, ratio = area * rng.uniform(*SCALE), aspect * math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(rng.randint(0, height - h), rng.randint(0, width - w), h, w)
    w, h = width, height  # none fits: as much of the centre as the ratio allows
    if width < min(RATIO) * aspect * height:
        h = round(width / (min(RATIO) * aspect))
    elif width > max(RATIO) * aspect * height:
        w = round(height * max(RATIO) * aspect)
    return Box((height - h) // 2, (width - w) // 2, h, w)


class CropToPatches:
    """For training: a random part of the image, about in the image's own shape, as patches.

    Args:
        max_patches: where a call names no number.
        box: (height, width, rng, aspect ratio) -> the part.
    """

    def __init__(self, patch_size: int, max_patches: int, box: Callable[..., Box] = random_box) -> None:
        self.patch_size, self.max_patches, self.box = patch_size, max_patches, box

    def __call__(self, pixels: Tensor, rng: random.Random, max_patches: int | None = None) -> Patches:
        """pixels (3, H, W) uint8 -> at most `max_patches` patches."""
        height, width = pixels.shape[1:]
        box = self.box(height, width, rng, width / height)
        size = patch_grid(box.height, box.width, self.patch_size, max_patches or self.max_patches)
        return Patches.of(resized(pixels, box, size), self.patch_size)


def resized(pixels: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """The box of pixels (3, H, W) with another height and width, bicubic with antialiasing as Pillow does it.

    Cropping comes first, so that no pixel from outside the box contributes. On a GPU torch has no such filter for
    uint8: pixels are resized as floats and rounded.
    """
    top, left, height, width = box
    part = pixels[None, :, top : top + height, left : left + width]  # (1, 3, height, width)
    part = part.contiguous(memory_format=torch.channels_last)  # torch has a fast path for it
    if part.device.type == "cpu":
        return interpolate(part, size, mode="bicubic", antialias=True)[0]
    return interpolate(part.float(), size, mode="bicubic", antialias=True)[0].round_().clamp_(0, 255).to(part.dtype)


def load_pixels(image: Callable[[], Image.Image]) -> Tensor:
    """(3, H, W) uint8 of the image of a record, see `decode_pixels`."""
    if not isinstance(image, ImageFile):
        return _as_tensor(np.array(image()))
    try:
        with open_regular(image.path) as file:
            content = file.read(MAX_IMAGE + 1)
    except OSError as error:
        raise DataError(f"{image.path} is not a readable image: {error}") from error
    return decode_pixels(content, image.path)


def decode_pixels(content: bytes, name: str | Path) -> Tensor:
    """(3, H, W) uint8 of an encoded image, a view of (H, W, 3).

    As in OpenCLIP's training the orientation in EXIF data is ignored. Raises `DataError` as `decode_image` does.
    """
    check_bytes(len(content), name)
    pixels = _ordinary_jpeg(content, name)
    return _as_tensor(pixels if pixels is not None else np.array(decode_image(BytesIO(content), name)))


def _ordinary_jpeg(content: bytes, name: str | Path) -> np.ndarray | None:
    """(H, W, 3) of a complete JPEG in the usual colour space; None for others, which Pillow decodes or refuses."""
    try:
        return simplejpeg.decode_jpeg(content, "RGB") if _jpeg_shape(content, name) else None
    except ValueError:
        return None


def _jpeg_shape(content: bytes, name: str | Path) -> tuple[int, int] | None:
    """Height and width in the header of a JPEG in the usual colour space; None for any other image."""
    if not content.startswith(JPEG):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    if colours != "YCbCr":
        return None
    check_shape(width, height, name)
    return height, width


def _as_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _check(size: int) -> None:
    if size < 1:
        raise ValueError(f"the image size must be at least 1 pixel, not {size}")


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")
