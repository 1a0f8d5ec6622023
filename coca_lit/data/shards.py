"""Reading webdataset shards as img2dataset writes them: tars of KEY.jpg, KEY.txt and KEY.json.

Shards come from strangers, so files are opened here and never through webdataset's URL handlers (a `pipe:` URL is a
shell command), members other than images, texts and JSON are not even read, and nothing is unpickled or unpacked.
"""

import glob
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from braceexpand import braceexpand
from webdataset.tariterators import group_by_keys, tar_file_iterator

from coca_lit.data.bad_samples import BadSamples
from coca_lit.data.records import DataError, not_found

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_WANTED = re.compile(rf".*\.({'|'.join(IMAGE_SUFFIXES)}|txt|json)", re.IGNORECASE | re.DOTALL)
_HOW = (
    "write LAION or other image-text pairs with img2dataset --output_format webdataset "
    'and pass "FOLDER/*.tar" as data.shards'
)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class ShardSample(NamedTuple):
    """A complete sample, its image still encoded."""

    key: str
    image: bytes
    caption: str
    shard: str  # for error reports


def expand_shards(shards: str | Sequence[str]) -> list[Path]:
    """Paths of "data/{00000..00099}.tar", "data/*.tar" or a list of such, in order and each once.

    Raises `DataError` for anything but local paths and file://, and `DataNotFoundError` for missing files.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    paths: dict[Path, None] = {}
    for pattern in patterns:
        for name in braceexpand(_local(pattern)):
            matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
            paths.update((Path(match), None) for match in matches)
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        what = f"{len(missing)} of {len(paths)} shards" if missing else "shards"
        where: list[Path | str] = [*missing[:1]] or [*patterns]
        raise not_found(what, where, _HOW)
    return list(paths)


def read_shard(path: Path, caption_key: str | None, bad: BadSamples) -> Iterator[ShardSample]:
    """The shard's complete samples in tar order; what is broken is counted in `bad` and skipped.

    Args:
        caption_key: field of KEY.json that holds the caption; None takes KEY.txt.
    """
    error = None
    try:
        if not _ends_properly(path):
            error = "the end is missing"
        with path.open("rb") as file:
            members = tar_file_iterator(file, select_files=lambda name: _WANTED.fullmatch(name) is not None)
            for fields in group_by_keys({**member, "__url__": path.name} for member in members):
                bad.seen += 1
                image, caption = _image(fields), _caption(fields, caption_key)
                if image and caption:
                    yield ShardSample(fields["__key__"], image, caption, path.name)
                else:
                    bad.add("missing caption" if image else "missing image", path.name)
    except DataError:
        raise
    except Exception as broken:  # tarfile, zlib, gzip and webdataset raise a zoo of types on broken bytes
        error = str(broken)
    if error:
        log.warning("%s is broken or truncated: %s", path, error)
        bad.seen += 1
        bad.add("broken or truncated shard", path.name)


def _local(pattern: str) -> str:
    if pattern.startswith("file://"):
        return pattern.removeprefix("file://")
    if scheme := _SCHEME.match(pattern):
        raise DataError(
            f"shards are read from local paths and file:// only, not from {scheme.group()!r} as in {pattern!r}: "
            "copy or mount them first"
        )
    return pattern


def _ends_properly(path: Path) -> bool:
    """Whether a plain tar has its two closing zero blocks; `tarfile` does not notice a cut between two members."""
    if path.suffix != ".tar":  # compressed ones are checked by decompression
        return True
    with path.open("rb") as file:
        file.seek(max(0, os.path.getsize(path) - 1024))
        return file.read() == bytes(1024)


def _image(fields: dict[str, Any]) -> bytes:
    return next((fields[suffix] for suffix in IMAGE_SUFFIXES if suffix in fields), b"")


def _caption(fields: dict[str, Any], caption_key: str | None) -> str:
    """The caption without outer blanks; "" where there is none."""
    if caption_key is None:
        return fields.get("txt", b"").decode("utf-8", errors="replace").strip()
    try:
        caption = json.loads(fields.get("json", b"{}"))[caption_key]
    except (ValueError, LookupError, TypeError):
        return ""
    return caption.strip() if isinstance(caption, str) else ""
