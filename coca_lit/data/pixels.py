"""From the bytes of an image, which may come from strangers, to its pixels: the only place that decodes images.

Training, evaluation, curation, captions and search get the same pixels. They are upright: the orientation in EXIF is
applied, as photos from phones need it. OpenCLIP's pipelines ignore it, so the pixels of such photos differ from theirs.
"""

from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from coca_lit.errors import DataError

MAX_IMAGE = 32 * 2**20  # bytes of an encoded image
MAX_PIXELS = 40_000_000  # as from a good camera: a file of 20 kB can claim any number
MAX_RATIO = 100  # of the longer side to the shorter one: resizing the shorter one would enlarge the other beyond bounds
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # pixels only: Pillow would run Ghostscript on an EPS named .jpg
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")  # of files in these formats
UNREAD = (".heic", ".heif", ".avif", ".tif", ".tiff", ".jxl", ".jp2", ".dng")  # photos in other formats
_JPEG = b"\xff\xd8\xff"  # its first bytes


def decode_pixels(content: bytes, name: str | Path) -> np.ndarray:
    """(H, W, 3) uint8 of an encoded image, upright, in RGB.

    Raises:
        DataError: it is anything but an image of `FORMATS` of sensible size; names `name`.
    """
    if len(content) > MAX_IMAGE:
        raise DataError(f"{name} has {len(content):,} bytes, more than the {MAX_IMAGE:,} that are decoded")
    pixels = _with_simplejpeg(content, name)
    return _with_pillow(content, name) if pixels is None else pixels


def decode_image(content: bytes, name: str | Path) -> Image.Image:
    """`decode_pixels` as an image of Pillow."""
    return Image.fromarray(decode_pixels(content, name))


def check_shape(width: int, height: int, name: str | Path, most: int) -> None:
    """Raises `DataError` for an image of more than `most` pixels, or whose resizing would exhaust the memory."""
    if width * height > most:
        raise DataError(f"{name} has {width} x {height} pixels, more than the {most:,} that are decoded")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise DataError(f"{name} has {width} x {height} pixels, an aspect ratio above {MAX_RATIO}")


def orientation_of(exif: bytes) -> int:
    """The orientation in EXIF data, 1 to 8, see `upright`; 1 without one."""
    found = Image.Exif()
    with suppress(Exception):  # it is damaged
        found.load(exif)
        orientation: Any = found.get(ExifTags.Base.Orientation)
        if orientation in range(1, 9):
            return int(orientation)
    return 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, 3) as they are meant to be seen; height and width are exchanged from 5 on."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def in_rgb(image: Image.Image) -> Image.Image:
    """With 8 bits a colour; of 16 bits of grey the upper ones, where Pillow's conversion would clip at 255."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # as older versions open them
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    return image.convert("RGB")


def _with_simplejpeg(content: bytes, name: str | Path) -> np.ndarray | None:
    """(H, W, 3), upright, of a JPEG in the usual colour space, faster than Pillow; None for any other image, and for a
    damaged one, which Pillow refuses, or not.
    """
    if not content.startswith(_JPEG):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        check_shape(width, height, name, MAX_PIXELS)
        if colours != "YCbCr":
            return None
        pixels = simplejpeg.decode_jpeg(content, "RGB")
    except ValueError:
        return None
    return upright(pixels, _orientation_of_jpeg(content))


def _orientation_of_jpeg(content: bytes) -> int:
    """Most images of the web have no EXIF data; only of others does Pillow read the segments before the pixels."""
    if b"Exif\0\0" in content:
        with suppress(Exception), Image.open(BytesIO(content), formats=("JPEG",)) as image:
            return orientation_of(image.info.get("exif", b""))
    return 1


def _with_pillow(content: bytes, name: str | Path) -> np.ndarray:
    """(H, W, 3), upright by the EXIF data in the content."""
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            check_shape(*image.size, name, MAX_PIXELS)  # from the header: nothing is decoded yet
            pixels = np.array(in_rgb(image))
            return upright(pixels, orientation_of(image.info.get("exif", b"")))  # which may follow the pixels
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not a readable image: it is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise many types on broken bytes
        raise DataError(f"{name} is not a readable image: {error}") from error
