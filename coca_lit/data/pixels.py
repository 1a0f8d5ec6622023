"""From the bytes of an image, which may come from strangers, to its pixels: the only place that decodes images.

Training, evaluation, curation, captions and search get the same pixels. They are upright: the orientation in EXIF is
applied, as photos from phones need it. OpenCLIP's pipelines ignore it, so the pixels of such photos differ from theirs.

Decoding takes bounded time and memory: the header gives the number of pixels, and a JPEG is decoded without its
metadata, which Pillow would keep, parse and copy at any length.
"""

import re
import struct
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from coca_lit.errors import DataError

MAX_IMAGE = 32 * 2**20  # bytes of an encoded image
# So that an image takes at most a second: a file of 20 kB can claim any number of pixels.
MAX_PIXELS = 40_000_000  # of a baseline JPEG, as from a good camera
MAX_SLOW_PIXELS = 16_000_000  # of any other image, whose pixels take up to four times as long
MAX_PROGRESSIVE = 12 * 2**20  # bytes of a progressive JPEG
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # pixels only: Pillow would run Ghostscript on an EPS named .jpg
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")  # of files in these formats
CLIPS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")  # of files that `coca_lit.data.video` decodes
MAX_RATIO = 100  # of the longer side to the shorter one: resizing the shorter one would enlarge the other beyond bounds
MAX_SCANS = 500  # of a JPEG, as libjpeg-turbo advises; usual progressive ones have ten
MAX_SCANNED = 200_000_000  # scans times pixels: one of 59 bytes takes 65 ms in an image of 16 million pixels
MAX_SEGMENTS = 1000  # before the first scan; 32 MB of metadata fill 512
MAX_MARKERS = 10_000  # after it, restarts not counted
MAX_READS = 10_000  # of Pillow, beyond one for each kB: its loops over chunks and comments take seconds to hours
JPEG = b"\xff\xd8\xff"  # its first bytes
_FRAMES, _PROGRESSIVE, _RARE = (
    (0xC0, 0xC1, 0xC2),
    0xC2,
    (0xC3, 0xC5, 0xC6, 0xC7, *range(0xC9, 0xCC), *range(0xCD, 0xD0)),
)
_SCAN, _END, _EXIF = 0xDA, 0xD9, 0xE1
_METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # APP0 and APP14 tell the colour space
_MARKER, _NEXT = re.compile(rb"\xff+([^\x00\xff])"), re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_ORIENTATION = 0x0112  # tag of EXIF


class Jpeg(NamedTuple):
    """A JPEG whose header was read."""

    content: bytes  # without metadata
    height: int  # as stored
    width: int
    orientation: int  # of EXIF, see `upright`
    ordinary: bool  # in the usual colour space, YCbCr


def decode_pixels(content: bytes, name: str | Path) -> np.ndarray:
    """(H, W, 3) uint8 of an encoded image, upright, in RGB.

    Raises:
        DataError: it is anything but an image of `FORMATS` of sensible size; names `name`.
    """
    check_bytes(len(content), name)
    jpeg = read_jpeg(content, name)
    if jpeg is None:
        return _with_pillow(content, name)
    pixels = None
    if jpeg.ordinary:
        with suppress(ValueError):  # not complete: Pillow refuses it, or not
            pixels = simplejpeg.decode_jpeg(jpeg.content, "RGB")
    return upright(_with_pillow(jpeg.content, name) if pixels is None else pixels, jpeg.orientation)


def decode_image(content: bytes, name: str | Path) -> Image.Image:
    """`decode_pixels` as an image of Pillow."""
    return Image.fromarray(decode_pixels(content, name))


def check_bytes(size: int, name: str | Path) -> None:
    """Raises `DataError` for an encoded image of more than `MAX_IMAGE` bytes."""
    if size > MAX_IMAGE:
        raise DataError(f"{name} has {size:,} bytes, more than the {MAX_IMAGE:,} that are decoded")


def check_shape(width: int, height: int, name: str | Path, most: int) -> None:
    """Raises `DataError` for an image of more than `most` pixels, or whose resizing would exhaust the memory."""
    if width * height > most:
        raise DataError(f"{name} has {width} x {height} pixels, more than the {most:,} that are decoded")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise DataError(f"{name} has {width} x {height} pixels, an aspect ratio above {MAX_RATIO}")


def read_jpeg(content: bytes, name: str | Path) -> Jpeg | None:
    """The header of a JPEG; None for any other image. Raises `DataError` if it is damaged, or too costly to decode."""
    if not content.startswith(JPEG):
        return None
    kept, exif, frame, progressive, at = [JPEG[:2]], b"", b"", False, 2
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.match(content, at)
        start = at if found is None else found.end()
        at = start + int.from_bytes(content[start : start + 2])
        if found is None or not start + 2 <= at <= len(content):
            raise DataError(f"{name} is not a readable image: the header of the JPEG is damaged")
        marker, segment = found[1][0], content[start:at]
        if marker == _SCAN:
            break
        if marker in _RARE:
            raise DataError(f"{name} is a JPEG with arithmetic or lossless coding: convert it")
        if marker in _FRAMES:
            frame, progressive = segment, marker == _PROGRESSIVE
        if marker == _EXIF and segment.startswith(b"Exif\0\0", 2):
            exif = exif or segment[2:]
        if marker not in _METADATA:
            kept.append(b"\xff%c%b" % (marker, segment))
    else:
        raise DataError(f"{name} is a JPEG with more than {MAX_SEGMENTS:,} segments of metadata")
    if len(frame) < 8:
        raise DataError(f"{name} is not a readable image: the JPEG has no frame")
    height, width = int.from_bytes(frame[3:5]), int.from_bytes(frame[5:7])
    slow = progressive or frame[7] == 4  # colours: CMYK
    check_shape(width, height, name, MAX_SLOW_PIXELS if slow else MAX_PIXELS)
    if progressive and len(content) > MAX_PROGRESSIVE:
        raise DataError(
            f"{name} is a progressive JPEG of more than {MAX_PROGRESSIVE:,} bytes: save it as a baseline one"
        )
    most = min(MAX_SCANS, MAX_SCANNED // max(width * height, 1))
    # The bytes of a scan's marker are no data of another scan, but may occur in what follows the image.
    if content.count(b"\xff\xda", start) >= most and _scans(content, at) > most:
        raise DataError(f"{name} is a JPEG of {width} x {height} pixels with more than {most} scans: save it again")
    plain = b"".join([*kept, b"\xff\xda", content[start:]])
    try:
        ordinary = simplejpeg.decode_jpeg_header(plain)[2] == "YCbCr"
    except ValueError:
        ordinary = False
    return Jpeg(plain, height, width, orientation_of(exif), ordinary)


def orientation_of(exif: bytes) -> int:
    """The orientation in EXIF data, 1 to 8, see `upright`; 1 without one. Pillow's parser copies every value, to which
    a forged file can give gigabytes.
    """
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


def _scans(content: bytes, at: int) -> int:
    """Scans of a JPEG whose first one has its data at `at`; `MAX_MARKERS` if there are as many markers."""
    scans = 1
    for _ in range(MAX_MARKERS):
        found = _NEXT.search(content, at)
        if found is None or found[1][0] == _END:
            return scans
        scans += found[1][0] == _SCAN
        at = found.end() + int.from_bytes(content[found.end() : found.end() + 2])
    return MAX_MARKERS


class _Counted(BytesIO):
    """An encoded image that Pillow may read in about as many parts as an honest file has."""

    def __init__(self, content: bytes, name: str | Path) -> None:
        super().__init__(content)
        self._reads, self._name = 0, name

    def read(self, size: int | None = -1) -> bytes:
        self._reads += 1
        if self._reads > MAX_READS + self.tell() // 1024:
            raise DataError(f"{self._name} has too many chunks or comments: save it again")
        return super().read(size)


def _with_pillow(content: bytes, name: str | Path) -> np.ndarray:
    """(H, W, 3), upright by the EXIF data in the content."""
    try:
        with Image.open(_Counted(content, name), formats=FORMATS) as image:
            most = MAX_PIXELS if image.format == "JPEG" else MAX_SLOW_PIXELS
            check_shape(*image.size, name, most)  # from the header: nothing is decoded yet
            pixels = np.array(in_rgb(image))
            return upright(pixels, orientation_of(image.info.get("exif", b"")))  # which may follow the pixels
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not a readable image: it is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise many types on broken bytes
        raise DataError(f"{name} is not a readable image: {error}") from error
