"""Shards to be recaptioned: where each sample lies in a tar, and a copy of the tar with other captions.

Nothing is unpacked: images are read at their offsets, so that many processes decode one shard and none holds it in
memory. All members of a sample are copied byte for byte, except .txt and .json, and members that could hold code, which
are left out. The same captions make the same file.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from coca_lit.data.shards.indexed import image_of
from coca_lit.data.shards.reader import holds_code
from coca_lit.data.shards.tar import TWICE, group_members, tar_members, tar_writer
from coca_lit.errors import DataError
from coca_lit.reading import open_regular, parse_json

ORIGINAL = "original_caption"  # key of KEY.json that keeps what KEY.txt said
ALL = "generated_captions"  # key of KEY.json with all new captions, if several were requested


class Sample(NamedTuple):
    """Where the members KEY.EXTENSION of a sample lie: {extension in lower case: (offset, size)}."""

    key: str
    members: dict[str, tuple[int, int]]

    @property
    def image(self) -> tuple[int, int] | None:
        return image_of(self.members) or None


def scan_shard(path: Path) -> tuple[list[Sample], str]:
    """The complete samples of a tar that have an image, in order, and what is wrong with the rest of it, or ""."""
    samples: list[Sample] = []
    problem = ""
    members = (member for member in tar_members(path) if not holds_code(member.name))
    try:
        for fields in group_members(members, content=False):
            if TWICE in fields:
                problem = f"two members have the name {fields[TWICE]!r}"
                continue
            places = {name: place for name, place in fields.items() if name and not name.startswith("_")}
            samples.append(Sample(fields["__key__"], places))
    except Exception as error:  # Python's reader raises many types on damaged files
        problem = str(error) or type(error).__name__  # the sample in which it occurs is not among the samples
    return [sample for sample in samples if sample.image], problem


def write_shard(source: Path, target: Path, samples: Sequence[Sample], captions: Mapping[str, Sequence[str]]) -> None:
    """Writes `target`, a copy of `source` with new captions; samples without one are left out.

    Args:
        captions: key of a sample -> its captions, the best first.

    Raises:
        DataError: nothing can be written there.
    """
    with tar_writer(target) as tar, open_regular(source) as file:
        for sample in samples:
            if sample.key not in captions:
                continue
            members = {}
            for extension, (offset, size) in sample.members.items():
                file.seek(offset)
                members[extension] = file.read(size)
            tar.write({"__key__": sample.key, **_recaptioned(members, captions[sample.key])})


def _recaptioned(members: dict[str, bytes], captions: Sequence[str]) -> dict[str, bytes]:
    """The members with the new caption as .txt and the old one in .json, unless that has an older one already."""
    content = members.get("json", b"{}")
    try:
        fields = parse_json(content, "the JSON", dict)
    except DataError:
        fields = {"broken_json": content.decode("utf-8", errors="replace")}
    if "txt" in members:
        fields.setdefault(ORIGINAL, members["txt"].decode("utf-8", errors="replace").strip())
    if len(captions) > 1:
        fields[ALL] = list(captions)
    return members | {"txt": captions[0].encode(), "json": json.dumps(fields).encode()}
