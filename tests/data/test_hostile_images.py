"""Images of strangers, as the web page and every data set decode them."""

import io
import os
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from coca_lit.data.pixels import MAX_IMAGE, decode_image, decode_pixels
from coca_lit.errors import DataError
from helpers.fuzzing import bounded, damaged, fuzz
from helpers.shards import jpeg

pytestmark = pytest.mark.slow


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_header(width: int, height: int, mode: str = "RGB") -> bytes:
    """A small JPEG that claims a size."""
    buffer = io.BytesIO()
    Image.new(mode, (16, 16)).save(buffer, "JPEG")
    content = buffer.getvalue()
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'


NO_PICTURES = {
    "svg": (SVG, "x is not a readable image: it is none of JPEG, PNG, WEBP, BMP, GIF"),
    "empty": (b"", "x is not a readable image: it is none of"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "x is not a readable image: it is none of"),
    "no width": (png_header(0, 9), "x is not a readable image"),
    "no pixels": (
        b"GIF89a" + struct.pack("<HHBBB", 0, 0, 0, 0, 0) + b";",
        "x (is not a readable image|has 0 x 0 pixels)",
    ),
    "bomb": (png_header(60_000, 60_000), "x is not a readable image: Image size .* could be decompression bomb"),
    "large": (png_header(8_000, 5_001), "x has 8000 x 5001 pixels, more than the 40,000,000 that are decoded"),
    "large JPEG": (jpeg_header(8_000, 5_001), "x has 8000 x 5001 pixels, more than the 40,000,000 that are decoded"),
    "large CMYK": (jpeg_header(8_000, 5_001, "CMYK"), "x has 8000 x 5001 pixels, more than the 40,000,000"),
    "line": (png_header(1, 30_000), "x has 1 x 30000 pixels, an aspect ratio above 100"),
    "cut": (jpeg()[:300], "x is not a readable image"),
    "long": (jpeg() + bytes(MAX_IMAGE), "x has 33,55.,... bytes, more than the 33,554,432 that are decoded"),
}


@pytest.mark.parametrize(("content", "said"), NO_PICTURES.values(), ids=NO_PICTURES)
def test_no_picture(content, said):
    with pytest.raises(DataError, match=f"^{said}"):
        decode_image(content, "x")


def _pictures() -> list[bytes]:
    picture = Image.frombytes("RGB", (20, 18), os.urandom(20 * 18 * 3))
    made = [jpeg(3)]
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        made.append(buffer.getvalue())
    return made


PICTURES = _pictures()


@fuzz
@given(st.sampled_from(PICTURES).flatmap(damaged))
def test_forged_images(content):
    with bounded():
        assert decode_pixels(content, "x").shape[2] == 3
