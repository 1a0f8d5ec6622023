"""Recaptioning shards: where each sample lies in a tar, and a copy of the tar with new captions.

Nothing is unpacked: images are read at their offsets, so that many processes decode one shard and none holds it in
memory. All members of a sample except .txt and .json are copied byte for byte. Time and owner of the members are
fixed, so that the same captions make the same file.
"""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from coca_lit.data.shards.reader import IMAGE_SUFFIXES
from coca_lit.data.shards.tar import split_name
from coca_lit.files import replacing

ORIGINAL = "original_caption"  # key of KEY.json for the first content of KEY.txt
ALL = "generated_captions"  # key of KEY.json for all new captions, if there are several


class Sample(NamedTuple):
    """The positions of the members KEY.EXTENSION of a sample: {extension: (offset, size)}."""

    key: str
    members: dict[str, tuple[int, int]]

    @property
    def image(self) -> tuple[int, int] | None:
        return next((place for name, place in self.members.items() if name.lower() in IMAGE_SUFFIXES), None)


def scan_shard(path: Path) -> tuple[list[Sample], str]:
    """The complete samples of a tar that have an image, in order, and what is wrong with the rest of it, or ""."""
    samples: list[Sample] = []
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                key, extension = split_name(member.name)
                plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
                if not key or not plain or _leads_out(key):
                    continue
                if not samples or samples[-1].key != key:
                    samples.append(Sample(key, {}))
                samples[-1].members[extension] = (member.offset_data, member.size)
        problem = "" if path.stat().st_size >= end + 2 * tarfile.BLOCKSIZE else "its end is missing"
    except (tarfile.TarError, OSError, ValueError) as error:
        samples, problem = samples[:-1], str(error)  # the last one may lack members
    return [sample for sample in samples if sample.image], problem


def write_shard(source: Path, target: Path, samples: Sequence[Sample], captions: Mapping[str, Sequence[str]]) -> None:
    """Writes `target`, a copy of `source` with new captions; samples without one are left out.

    Args:
        captions: key of a sample -> its captions, the best first.

    Raises:
        DataError: nothing can be written there.
    """
    with replacing(target) as temporary, source.open("rb") as file, tarfile.open(temporary, "w") as tar:
        for sample in samples:
            if sample.key in captions:
                for extension, content in _recaptioned(_read(file, sample), captions[sample.key]).items():
                    member = tarfile.TarInfo(f"{sample.key}.{extension}")  # with time 0 and no owner
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _read(file: IO[bytes], sample: Sample) -> dict[str, bytes]:
    members = {}
    for extension, (offset, size) in sample.members.items():
        file.seek(offset)
        members[extension] = file.read(size)
    return members


def _recaptioned(members: dict[str, bytes], captions: Sequence[str]) -> dict[str, bytes]:
    """The members with the new caption as .txt and the old one in .json, unless that has an older one already."""
    fields = _fields(members.get("json", b"{}"))
    if "txt" in members:
        fields.setdefault(ORIGINAL, members["txt"].decode("utf-8", errors="replace").strip())
    if len(captions) > 1:
        fields[ALL] = list(captions)
    return members | {"txt": captions[0].encode(), "json": json.dumps(fields).encode()}


def _fields(content: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except ValueError:
        fields = None
    return fields if isinstance(fields, dict) else {"broken_json": content.decode("utf-8", errors="replace")}


def _leads_out(key: str) -> bool:
    path = PurePosixPath(key)
    return path.is_absolute() or ".." in path.parts
