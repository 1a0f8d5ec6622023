"""Reading webdataset shards as img2dataset writes them: tars of KEY.jpg, KEY.txt and KEY.json.

Shards come from strangers: nothing is unpickled or unpacked, members other than images, texts and JSON are not even
read, and those that could hold code count as bad samples.
"""

import json
import logging
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from webdataset.tariterators import group_by_keys

from coca_lit.data.bad_samples import BadSample, BadSampleError, BadSamples
from coca_lit.data.records import clean_captions
from coca_lit.data.shards.listing import Shard
from coca_lit.data.shards.manifest import check_digest
from coca_lit.data.shards.tar import tar_members
from coca_lit.errors import DataError

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_TEXT = 2**20  # bytes of a caption or of the JSON
_WANTED = re.compile(rf".*\.({'|'.join(IMAGE_SUFFIXES)}|txt|json)", re.IGNORECASE | re.DOTALL)
_CODE = re.compile(r".*\.(pyd|pickle|pkl|pth|pt|py|so|sh|exe)", re.IGNORECASE | re.DOTALL)


class ShardSample(NamedTuple):
    """A complete sample, its image still encoded."""

    key: str
    image: bytes
    captions: dict[str, tuple[str, ...]]  # by where they stand, "txt" or a field of the JSON; none is empty
    shard: str  # for error reports


def read_shard(
    shard: Shard, caption_keys: Collection[str], bad: BadSamples, verify: bool = False
) -> Iterator[ShardSample]:
    """The shard's complete samples in tar order; what is broken is counted in `bad` and skipped.

    Args:
        caption_keys: where captions may stand: "txt" for KEY.txt, else a field of KEY.json with a text or a list of
            them. A sample needs one of these places.
        verify: first compare its digest with the manifest; raises `DataError` when it differs.
    """
    for fields in read_fields(shard, bad, verify):
        try:
            sample = sample_of(fields, caption_keys, shard.name)
        except BadSampleError as error:
            bad.catch(error)
        else:
            yield sample


def sample_of(fields: dict[str, Any], caption_keys: Collection[str], shard: str) -> ShardSample:
    """The sample that a shard's files of one key make; raises `BadSampleError` if it is not complete."""
    image, captions = image_of(fields), _captions(fields, caption_keys)
    if not image or not captions:
        raise BadSampleError(BadSample(shard, fields["__key__"], _what_is_missing(image, caption_keys)))
    return ShardSample(fields["__key__"], image, captions, shard)


def read_fields(shard: Shard, bad: BadSamples, verify: bool = False, content: bool = True) -> Iterator[dict[str, Any]]:
    """The files of each sample by suffix, and its "__key__"; counts samples, and what the shard as a whole lacks.

    Args:
        content: of the files; otherwise the (offset, size) in bytes of each.
    """
    seen, error = bad.seen, None
    try:
        with shard.local() as path:
            if verify and shard.entry:
                check_digest(shard.name, path, shard.entry)
            for fields in group_by_keys(_members(path, shard.name, bad, content)):
                bad.seen += 1
                yield fields
    except DataError:
        raise
    except Exception as broken:  # tarfile, zlib, gzip, webdataset and fsspec raise a zoo of types
        error = str(broken) or type(broken).__name__
    if error:
        log.warning("%s is broken or truncated: %s", shard.name, error)
        lost = shard.entry and shard.entry.samples - (bad.seen - seen)
        bad.lose("broken or truncated shard", shard.name, lost, error)
    elif bad.seen == seen:
        bad.lose("empty shard", shard.name, shard.entry and shard.entry.samples)
    else:
        bad.end_of_shard(bad.seen - seen)


def _members(path: Path, shard: str, bad: BadSamples, content: bool) -> Iterator[dict[str, Any]]:
    """What `group_by_keys` takes."""
    for member in tar_members(path, lambda name: content and _WANTED.fullmatch(name) is not None):
        if _WANTED.fullmatch(member.name):
            data = member.content if content else (member.offset, member.size)
            yield {"fname": member.name, "data": data, "__url__": shard}
        elif _CODE.fullmatch(member.name):
            bad.seen += 1
            bad.add("code in a shard", shard, member.name)


def image_of(fields: dict[str, Any]) -> bytes:
    return next((fields[suffix] for suffix in IMAGE_SUFFIXES if suffix in fields), b"")


def _captions(fields: dict[str, Any], keys: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Captions without outer blanks, by key; texts far too long for one are passed over."""
    found: dict[str, tuple[str, ...]] = {}
    content = _json(fields) if any(key != "txt" for key in keys) else {}
    for key in keys:
        text = _text(fields) if key == "txt" else content.get(key)
        texts = text if isinstance(text, list) else [text]
        found[key] = clean_captions(text for text in texts if isinstance(text, str) and len(text) <= MAX_TEXT)
    return {key: captions for key, captions in found.items() if captions}


def _text(fields: dict[str, Any]) -> str:
    return fields.get("txt", b"")[: MAX_TEXT + 1].decode("utf-8", errors="replace")


def _json(fields: dict[str, Any]) -> dict[str, Any]:
    text = fields.get("json", b"")
    try:
        content = json.loads(text) if len(text) <= MAX_TEXT else {}
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _what_is_missing(image: bytes, keys: Collection[str]) -> str:
    if not image:
        return "missing image"
    return "missing caption" if "txt" in keys else f"no caption in the JSON under {', '.join(keys)}"
