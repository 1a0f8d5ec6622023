"""`manifest.json` beside shards says what each of them holds, so that damage and silent changes are noticed.

`coca-data` writes it. Sizes are compared when a training starts; the digest of a shard just before it is read, once per
epoch, which costs less than a hundredth of decoding its images.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from coca_lit.errors import DataError
from coca_lit.files import atomic_write

NAME = "manifest.json"


class ManifestEntry(NamedTuple):
    """What is known about one shard."""

    samples: int  # usable ones
    bytes: int
    sha256: str


Manifest = Mapping[str, ManifestEntry]  # by file name


def parse_manifest(text: str, where: str) -> Manifest:
    """Raises `DataError` naming `where` if the text is not that of a manifest."""
    try:
        rows = json.loads(text)["shards"]
        return {row["name"]: ManifestEntry(int(row["samples"]), int(row["bytes"]), row["sha256"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where} is not a manifest of shards: write it again with coca-data check") from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, empty if it has none."""
    path = folder / NAME
    return parse_manifest(path.read_text(), str(path)) if path.is_file() else {}


def write_manifest(folder: Path, entries: Manifest) -> Path:
    """Written beside the old one and then renamed, so that there is a whole manifest at every moment."""
    path = folder / NAME
    totals = {
        "samples": sum(entry.samples for entry in entries.values()),
        "bytes": sum(entry.bytes for entry in entries.values()),
    }
    rows = [{"name": name, **entries[name]._asdict()} for name in sorted(entries)]
    atomic_write(path, (json.dumps({**totals, "shards": rows}, indent=1) + "\n").encode())
    return path


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_size(shard: str, size: int, entry: ManifestEntry) -> None:
    if size != entry.bytes:
        raise DataError(f"{shard} has {size:,} bytes, but {entry.bytes:,} {_REFUSED}")


def check_digest(shard: str, path: Path, entry: ManifestEntry) -> None:
    if sha256_of(path) != entry.sha256:
        raise DataError(f"{shard} has another sha256 than {_REFUSED}")


_REFUSED = (
    f"according to its {NAME}: it was changed or damaged; copy it again, or accept it as it is with "
    "coca-data check --update"
)
