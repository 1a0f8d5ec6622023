"""Encoded images to uint8 pixels, for training: ordinary JPEGs by libjpeg-turbo straight into an array, anything else
by Pillow. Both give the same pixels, as Pillow decodes JPEGs with that library too and then copies them twice.
"""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from coca_lit.data.records import ImageFile, check_shape, decode_image
from coca_lit.errors import DataError

JPEG = b"\xff\xd8\xff"  # how one begins


def load_pixels(image: Callable[[], Image.Image]) -> Tensor:
    """(3, H, W) uint8 of the image of a record, see `decode_pixels`."""
    if not isinstance(image, ImageFile):
        return _as_tensor(np.array(image()))
    try:
        content = image.path.read_bytes()
    except OSError as error:
        raise DataError(f"{image.path} is not a readable image: {error}") from error
    return decode_pixels(content, image.path)


def decode_pixels(content: bytes, name: str | Path) -> Tensor:
    """(3, H, W) uint8, a view of (H, W, 3).

    As in OpenCLIP's training the orientation in EXIF data is not looked at. Raises `DataError` as `decode_image` does.
    """
    pixels = _ordinary_jpeg(content, name) if content.startswith(JPEG) else None
    return _as_tensor(pixels if pixels is not None else np.array(decode_image(BytesIO(content), name)))


def _ordinary_jpeg(content: bytes, name: str | Path) -> np.ndarray | None:
    """(H, W, 3) of one in the usual colour space and whole; Pillow knows what to do, or to say, about the others."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours != "YCbCr":
            return None
        check_shape(width, height, name)
        return simplejpeg.decode_jpeg(content, "RGB")
    except ValueError:
        return None


def _as_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)
