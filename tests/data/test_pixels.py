"""Decoding for training: the pixels of Pillow, and its errors, whichever library decodes."""

import io
import struct

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from coca_lit.data.records import ImageFile, decode_image
from coca_lit.data.transforms import decode_pixels, load_pixels
from coca_lit.errors import DataError


def picture(mode: str = "RGB") -> Image.Image:
    """A gradient with some noise, of odd size."""
    down, across = np.mgrid[0:67, 0:91]
    grain = np.random.default_rng(0).integers(0, 30, (67, 91))
    pixels = np.stack([down * 3, across * 2, (down + across) + grain], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    return encoded(picture(), exif=exif)


def from_pillow(content: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB"))).permute(2, 0, 1)


ORDINARY = {
    "4:2:0": encoded(picture()),
    "4:4:4": encoded(picture(), quality=95, subsampling=0),
    "progressive": encoded(picture(), progressive=True),
    "turned": turned(),
}
OTHER = {
    "grey": encoded(picture("L")),
    "CMYK": encoded(picture("CMYK")),
    "kept as RGB": encoded(picture(), keep_rgb=True),
    "PNG of 16 bits": encoded(Image.fromarray(np.arange(6000, dtype=np.uint16).reshape(60, 100)), "PNG"),
    "transparent PNG": encoded(picture("RGBA"), "PNG"),
    "palette": encoded(picture("P"), "GIF"),
    "WebP": encoded(picture(), "WEBP"),
}


@pytest.mark.parametrize("content", [*ORDINARY.values(), *OTHER.values()], ids=[*ORDINARY, *OTHER])
def test_pixels_are_those_of_pillow(content):
    pixels = decode_pixels(content, "x")
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, from_pillow(content))


@pytest.mark.parametrize("content", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_jpegs_do_not_go_through_pillow(content, monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    assert decode_pixels(content, "x").shape == (3, 67, 91)


def jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    content = encoded(picture())
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


@pytest.mark.parametrize(
    "content",
    [b"", b"junk", b"\xff\xd8\xff", encoded(picture())[:300], encoded(picture())[:-2], jpeg_of_size(9000, 9000),
     jpeg_of_size(65000, 20)],
    ids=["empty", "junk", "start alone", "cut", "without its end", "bomb", "line"],
)  # fmt: skip
def test_errors_are_those_of_pillow(content):
    with pytest.raises(DataError) as expected:
        decode_image(io.BytesIO(content), "x")
    with pytest.raises(DataError) as error:
        decode_pixels(content, "x")
    assert str(error.value) == str(expected.value)


def test_a_bomb_is_refused_from_its_header(monkeypatch):
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    with pytest.raises(DataError, match="x has 9000 x 9000 pixels, more than the 40,000,000 that are decoded"):
        decode_pixels(jpeg_of_size(9000, 9000), "x")


def test_images_of_records(tmp_path):
    (tmp_path / "x.jpg").write_bytes(encoded(picture()))
    expected = from_pillow(encoded(picture()))
    assert torch.equal(load_pixels(ImageFile(tmp_path / "x.jpg")), expected)
    assert torch.equal(load_pixels(lambda: picture()), torch.from_numpy(np.array(picture())).permute(2, 0, 1))
    with pytest.raises(DataError, match=r"gone\.jpg is not a readable image: .*No such file"):
        load_pixels(ImageFile(tmp_path / "gone.jpg"))
