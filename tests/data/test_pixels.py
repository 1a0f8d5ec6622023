"""Decoding: the pixels of Pillow, upright, whichever library decodes."""

import io
import struct

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps

from coca_lit.data.pixels import decode_pixels, in_rgb
from coca_lit.data.transforms import build_transform
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


def turned(form: str = "JPEG", orientation: int = 6, mode: str = "RGB") -> bytes:
    """6: to be shown turned by 90 degrees."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "A camera", orientation
    return encoded(picture(mode), form, exif=exif)


def from_pillow(content: bytes) -> np.ndarray:
    return np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))


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
    "transparent PNG": encoded(picture("RGBA"), "PNG"),
    "palette": encoded(picture("P"), "GIF"),
    "WebP": encoded(picture(), "WEBP"),
}


@pytest.mark.parametrize("content", [*ORDINARY.values(), *OTHER.values()], ids=[*ORDINARY, *OTHER])
def test_pixels_are_those_of_pillow(content):
    decoded = decode_pixels(content, "x")
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, from_pillow(content))


def test_grey_of_16_bits_keeps_its_shades():
    grey = np.asarray(picture("L"))
    low = np.random.default_rng(1).integers(0, 256, grey.shape, dtype=np.uint16)
    content = encoded(Image.fromarray(grey.astype(np.uint16) * 256 + low), "PNG")
    assert content[24] == 16  # bits
    opened = Image.open(io.BytesIO(content))
    assert np.array_equal(decode_pixels(content, "x"), np.stack([grey] * 3, axis=-1))
    assert torch.equal(build_transform(size=32)(opened), build_transform(size=32)(Image.fromarray(grey)))
    as_before = opened.convert("I")  # as Pillow opens them until version 11
    as_before.format = "PNG"
    assert np.array_equal(np.asarray(in_rgb(as_before)), np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize("content", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_jpegs_do_not_go_through_pillow(content, monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    assert sorted(decode_pixels(content, "x").shape) == [3, 67, 91]


def jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    content = encoded(picture())
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


@pytest.mark.parametrize(
    "content",
    [b"", b"junk", b"\xff\xd8\xff", encoded(picture())[:300], encoded(picture())[:-2], jpeg_of_size(9000, 9000),
     jpeg_of_size(65000, 20), jpeg_of_size(0, 20)],
    ids=["empty", "junk", "start alone", "cut", "without its end", "bomb", "line", "no pixels"],
)  # fmt: skip
def test_no_image(content):
    with pytest.raises(DataError, match=r"^x .*(is not a readable image|more than|aspect ratio)"):
        decode_pixels(content, "x")


def test_a_bomb_is_refused_from_its_header(monkeypatch):
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    with pytest.raises(DataError, match=r"9000 x 9000.*40,000,000"):
        decode_pixels(jpeg_of_size(9000, 9000), "x")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(orientation):
    """As Pillow turns them, whichever decoder, and also where the user opened the image."""
    for content in (turned("JPEG", orientation), turned("JPEG", orientation, "L"), turned("PNG", orientation),
                    turned("WEBP", orientation)):  # fmt: skip
        expected = from_pillow(content)
        assert np.array_equal(decode_pixels(content, "x"), expected)
        assert torch.equal(
            build_transform(size=32)(Image.open(io.BytesIO(content))),
            build_transform(size=32)(Image.fromarray(expected)),
        )


def with_segments(content: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG with these segments, by marker, in place of its JFIF header, which may stop Pillow from parsing EXIF."""
    made = b"".join(b"\xff%c%b%b" % (marker, struct.pack(">H", len(body) + 2), body) for marker, body in segments)
    return content[:2] + made + content[20:]


def test_the_orientation_is_found_behind_other_segments():
    exif = turned()[24:].partition(b"\xff\xdb")[0]
    assert exif.startswith(b"Exif")
    other = (0xE2, b"ICC_PROFILE\0" + bytes(60_000)), (0xFE, b"a comment"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0")
    plain = encoded(picture())
    content = with_segments(plain, *other, (0xE1, exif), (0xE1, b"Exif\0\0"))
    filled = content[:2] + b"\xff\xff" + content[2:]
    for jpeg in (content, filled):
        assert np.array_equal(decode_pixels(jpeg, "x"), np.rot90(from_pillow(plain), -1))
    at_the_end = plain + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    assert np.array_equal(decode_pixels(at_the_end, "x"), from_pillow(plain))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif",
    [b"", b"II*\0", b"II*\0" + struct.pack("<I", 2**32 - 1), b"II*\0" + struct.pack("<IH", 8, 65_535),
     b"MM\0*" + struct.pack(">IHHHIHH", 8, 1, 0x0112, 3, 1, 9, 0)],
    ids=["none", "cut", "elsewhere", "more entries", "no orientation"],
)  # fmt: skip
def test_damaged_exif_counts_as_none(exif):
    content = with_segments(encoded(picture("L")), (0xE1, b"Exif\0\0" + exif))
    assert decode_pixels(content, "x").shape == (67, 91, 3)


def test_animations_give_their_first_picture():
    frames = [picture().convert("P"), *(picture().rotate(turn).convert("P") for turn in range(1, 4))]
    for form in ("GIF", "PNG", "WEBP"):
        content = encoded(
            frames[0], form, save_all=True, append_images=frames[1:], **{"lossless": True} if form == "WEBP" else {}
        )
        assert np.array_equal(decode_pixels(content, "x"), np.array(frames[0].convert("RGB")))
