"""A sample of a shard: KEY.jpg, or what stands in its place, KEY.txt and KEY.json, as img2dataset writes them."""

import functools
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from coca_lit import extensions
from coca_lit.data.bad_samples import BadSample, BadSampleError
from coca_lit.data.inputs import IMAGES, ImageReader
from coca_lit.data.pixels import MAX_IMAGE
from coca_lit.data.records import clean_captions
from coca_lit.data.shards.tar import MAX_MEMBER
from coca_lit.errors import DataError
from coca_lit.reading import encoding_of, parse_json

MAX_TEXT = 2**20  # bytes of a caption or of the JSON
OWN_KINDS = (IMAGES.suffixes, ("txt",), ("json",))  # the suffixes of members that need no project

Pair = tuple[bytes, dict[str, tuple[str, ...]]]
"""An encoded image, or what stands in its place, and its captions by caption key, "txt" or a field of the JSON; none is
empty.
"""


def pair_of(fields: dict[str, Any], caption_keys: Collection[str], shard: str, reader: ImageReader = IMAGES) -> Pair:
    """The image, or what stands in its place, and the captions, among the members with one key.

    Args:
        reader: of the image.
        caption_keys: where captions may be: "txt" for KEY.txt, else a field of KEY.json that holds a text or a list
            of texts. A sample needs at least one of them.

    Raises:
        BadSampleError: it is not complete.
    """
    key = fields["__key__"]
    image = image_of(fields, reader.suffixes)
    captions = {}
    content = {}
    if any(name != "txt" for name in caption_keys):
        with suppress(DataError):
            content = parse_json(_bounded(fields, "json"), "the JSON", dict)
    for name in caption_keys:
        if name == "txt":
            encoded = _bounded(fields, "txt")
            text: Any = encoded.decode(encoding_of(encoded), errors="replace")
        else:
            text = content.get(name)
        texts = text if isinstance(text, list) else [text]
        fitting = clean_captions(text for text in texts if isinstance(text, str))
        if fitting:
            captions[name] = fitting
    if image and captions:
        return image, captions
    missing = f"no caption in the JSON under {', '.join(caption_keys)}"
    if not image or "txt" in caption_keys:
        missing = "missing caption" if image else f"missing {reader.kind}"
    raise BadSampleError(BadSample(shard, key, missing))


def _bounded(fields: Mapping[str, Any], suffix: str) -> bytes:
    """The content of a member, empty if there is none or it is too large."""
    content: bytes = fields.get(suffix, b"")
    return content if len(content) <= MAX_TEXT else b""


def suffix_of(fields: Mapping[str, Any], suffixes: Sequence[str] = IMAGES.suffixes) -> str:
    """The suffix of the image among the members of a sample: the first that is there, "" if none is."""
    return next((suffix for suffix in suffixes if suffix in fields), "")


def image_of(fields: Mapping[str, Any], suffixes: Sequence[str] = IMAGES.suffixes) -> Any:
    """The image among the members of a sample, empty bytes if there is none."""
    suffix = suffix_of(fields, suffixes)
    return fields[suffix] if suffix else b""


@functools.cache
def member_kinds() -> tuple[tuple[str, ...], ...]:
    """The suffixes of the members of a sample that are read: of images, texts, JSON, and of each declared kind of
    input. Of each the first that is there is read.
    """
    kinds: dict[str, list[str]] = {}
    for ending, target in extensions.declared("inputs").items():
        kinds.setdefault(target, []).append(ending.removeprefix("."))
    return (*OWN_KINDS, *map(tuple, kinds.values()))


def read_limit(member: str) -> int:
    """How many bytes of a member are read, at most: one more than its kind may have."""
    name = member.lower()
    suffix = name.rpartition(".")[2] if "." in name else ""
    images, texts, objects, *others = member_kinds()
    if suffix in images:
        return MAX_IMAGE + 1
    if suffix in (*texts, *objects):
        return MAX_TEXT + 1
    return MAX_MEMBER + 1 if any(suffix in kind for kind in others) else 0
