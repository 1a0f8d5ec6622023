"""From the bytes of an image, which may come from strangers, to its pixels: the only place that decodes images.

Training, evaluation, curation, captions and search get the same pixels. They are upright: the orientation in EXIF is
applied, as photos from phones need it. OpenCLIP's pipelines ignore it, so the pixels of such photos differ from theirs.
"""

import struct
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from coca_lit.errors import DataError

MAX_IMAGE = 32 * 2**20  # bytes of an encoded image
MAX_PIXELS = 40_000_000  # as from a good camera: a file of 20 kB can claim any number
MAX_RATIO = 100  # of the longer side to the shorter one: resizing the shorter one would enlarge the other beyond bounds
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # pixels only: Pillow would run Ghostscript on an EPS named .jpg
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")  # of files in these formats
UNREAD = (".heic", ".heif", ".avif", ".tif", ".tiff", ".jxl", ".jp2", ".dng")  # photos in other formats
_JPEG = b"\xff\xd8\xff"  # its first bytes
_SCAN, _EXIF = 0xDA, 0xE1  # markers of a JPEG
_ORIENTATION = 0x0112  # tag of EXIF


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
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    with suppress(struct.error):  # it ends too early
        (first,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, first)
        for at in range(first + 2, first + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, at)
            if tag == _ORIENTATION and kind == 3 and 1 <= value <= 8:  # 3: a number of 16 bits
                return int(value)
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
    return upright(pixels, orientation_of(_exif_of(content)))


def _exif_of(jpeg: bytes) -> bytes:
    """The first EXIF data of a JPEG: after its first two bytes come segments of a marker, two bytes that tell the
    length from there on, and content, until the pixels.
    """
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF and jpeg[at + 1] != _SCAN:
        if jpeg[at + 1] == 0xFF:  # a filling byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4])
        if jpeg[at + 1] == _EXIF and jpeg.startswith(b"Exif\0\0", at + 4):
            return jpeg[at + 4 : end]
        at = end
    return b""


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
