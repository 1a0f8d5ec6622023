"""Reading webdataset shards as img2dataset writes them: tars of KEY.jpg, KEY.txt and KEY.json.

Shards come from strangers: nothing is unpickled or unpacked, members other than images, texts and JSON are not even
read, and those that could hold code count as bad samples.
"""

import json
import logging
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from webdataset.tariterators import group_by_keys

from coca_lit.data.bad_samples import BadSamples
from coca_lit.data.manifest import check_digest
from coca_lit.data.records import DataError
from coca_lit.data.shard_set import Shard
from coca_lit.data.tar_members import tar_members

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_TEXT = 2**20  # bytes of a caption or of the JSON
_WANTED = re.compile(rf".*\.({'|'.join(IMAGE_SUFFIXES)}|txt|json)", re.IGNORECASE | re.DOTALL)
_CODE = re.compile(r".*\.(pyd|pickle|pkl|pth|pt|py|so|sh|exe)", re.IGNORECASE | re.DOTALL)


class ShardSample(NamedTuple):
    """A complete sample, its image still encoded."""

    key: str
    image: bytes
    caption: str
    shard: str  # for error reports


def read_shard(shard: Shard, caption_key: str | None, bad: BadSamples, verify: bool = False) -> Iterator[ShardSample]:
    """The shard's complete samples in tar order; what is broken is counted in `bad` and skipped.

    Args:
        caption_key: field of KEY.json that holds the caption; None takes KEY.txt.
        verify: first compare its digest with the manifest; raises `DataError` when it differs.
    """
    seen, error = bad.seen, None
    try:
        if verify and shard.entry:
            check_digest(shard.name, shard.path, shard.entry)
        for fields in group_by_keys(_members(shard, bad)):
            bad.seen += 1
            image, caption = _image(fields), _caption(fields, caption_key)
            if image and caption:
                yield ShardSample(fields["__key__"], image, caption, shard.name)
            else:
                bad.add(_what_is_missing(image, caption_key), shard.name, fields["__key__"])
    except DataError:
        raise
    except Exception as broken:  # tarfile, zlib, gzip and webdataset raise a zoo of types on broken bytes
        error = str(broken)
    if error:
        log.warning("%s is broken or truncated: %s", shard.name, error)
        lost = shard.entry and shard.entry.samples - (bad.seen - seen)
        bad.lose("broken or truncated shard", shard.name, lost, error)
    elif bad.seen == seen:
        bad.lose("empty shard", shard.name, shard.entry and shard.entry.samples)
    else:
        bad.end_of_shard(bad.seen - seen)


def _members(shard: Shard, bad: BadSamples) -> Iterator[dict[str, Any]]:
    """What `group_by_keys` takes."""
    for name, content in tar_members(shard.path, lambda name: _WANTED.fullmatch(name) is not None):
        if _WANTED.fullmatch(name):
            yield {"fname": name, "data": content, "__url__": shard.name}
        elif _CODE.fullmatch(name):
            bad.seen += 1
            bad.add("code in a shard", shard.name, name)


def _image(fields: dict[str, Any]) -> bytes:
    return next((fields[suffix] for suffix in IMAGE_SUFFIXES if suffix in fields), b"")


def _caption(fields: dict[str, Any], caption_key: str | None) -> str:
    """The caption without outer blanks; "" where there is none, or a text far too long for one."""
    text = fields.get("txt" if caption_key is None else "json", b"")
    if len(text) > MAX_TEXT:
        return ""
    if caption_key is None:
        return text.decode("utf-8", errors="replace").strip()
    try:
        caption = json.loads(text or b"{}")[caption_key]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    return caption.strip() if isinstance(caption, str) else ""


def _what_is_missing(image: bytes, caption_key: str | None) -> str:
    if not image:
        return "missing image"
    return "missing caption" if caption_key is None else f"no caption {caption_key!r} in the JSON"
