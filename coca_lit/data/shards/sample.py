"""A sample of a shard: KEY.jpg, or a clip KEY.mp4, KEY.txt and KEY.json, as img2dataset writes them."""

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from coca_lit.data.bad_samples import BadSample, BadSampleError
from coca_lit.data.pixels import CLIPS, MAX_IMAGE
from coca_lit.data.records import clean_captions
from coca_lit.data.shards.tar import MAX_MEMBER
from coca_lit.data.sources import EncodedImage, ImageSource
from coca_lit.errors import DataError
from coca_lit.reading import encoding_of, parse_json

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CLIP_SUFFIXES = tuple(suffix.removeprefix(".") for suffix in CLIPS)
MAX_TEXT = 2**20  # bytes of a caption or of the JSON
_WANTED = re.compile(rf".*\.({'|'.join((*IMAGE_SUFFIXES, *CLIP_SUFFIXES))}|txt|json)", re.IGNORECASE | re.DOTALL)
MEMBERS = (IMAGE_SUFFIXES, ("txt",), ("json",), CLIP_SUFFIXES)  # of a sample; the first of each that is there

Pair = tuple[bytes, dict[str, tuple[str, ...]]]
"""An encoded image, or what stands in its place, and its captions by caption key, "txt" or a field of the JSON; none is
empty.
"""


class MemberReader:
    """Which members of a sample hold its image, and what reads them: here images. A subclass reads what stands in their
    place.

    Attributes:
        kind: for people.
        suffixes: of the members.
    """

    kind = "image"
    suffixes: Sequence[str] = IMAGE_SUFFIXES

    def source(self, content: bytes, name: str) -> ImageSource:
        return EncodedImage(content, name)


class ClipReader(MemberReader):
    """Clips, of which a model sees `frames` frames."""

    kind = "clip"
    suffixes = CLIP_SUFFIXES

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def source(self, content: bytes, name: str) -> ImageSource:
        from coca_lit.data.video import EncodedClip

        return EncodedClip(content, name, self.frames)


IMAGES = MemberReader()


def pair_of(fields: dict[str, Any], caption_keys: Collection[str], shard: str, reader: MemberReader = IMAGES) -> Pair:
    """The image, or what stands in its place, and the captions, among the members with one key.

    Args:
        reader: of the image.
        caption_keys: where captions may be: "txt" for KEY.txt, else a field of KEY.json that holds a text or a list
            of texts. A sample needs at least one of them.

    Raises:
        BadSampleError: it is not complete.
    """
    key, image = fields["__key__"], image_of(fields, reader.suffixes)
    captions, content = {}, {}
    whole = {name: text for name in ("txt", "json") if len(text := fields.get(name, b"")) <= MAX_TEXT}
    if any(key != "txt" for key in caption_keys):
        with suppress(DataError):
            content = parse_json(whole.get("json", b""), "the JSON", dict)
    for name in caption_keys:
        of_file = whole.get("txt", b"")
        text = of_file.decode(encoding_of(of_file), errors="replace") if name == "txt" else content.get(name)
        texts = text if isinstance(text, list) else [text]
        if fitting := clean_captions(text for text in texts if isinstance(text, str)):
            captions[name] = fitting
    if image and captions:
        return image, captions
    missing = f"no caption in the JSON under {', '.join(caption_keys)}"
    if not image or "txt" in caption_keys:
        missing = "missing caption" if image else f"missing {reader.kind}"
    raise BadSampleError(BadSample(shard, key, missing))


def kind_of(fields: Mapping[str, Any], suffixes: Sequence[str] = IMAGE_SUFFIXES) -> str:
    """The suffix of the image or clip among the members of a sample: the first that is there, "" if none is."""
    return next((suffix for suffix in suffixes if suffix in fields), "")


def image_of(fields: Mapping[str, Any], suffixes: Sequence[str] = IMAGE_SUFFIXES) -> Any:
    """The image or clip among the members of a sample, empty bytes if there is none."""
    return fields[kind] if (kind := kind_of(fields, suffixes)) else b""


def read_limit(member: str) -> int:
    """How many bytes of a member are read, at most: one more than its kind may have."""
    if not (found := _WANTED.fullmatch(member)):
        return 0
    suffix = found[1].lower()
    return (MAX_TEXT if suffix in ("txt", "json") else MAX_MEMBER if suffix in CLIP_SUFFIXES else MAX_IMAGE) + 1
