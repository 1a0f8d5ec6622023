"""A shard, and what the manifest of its folder says about it.

`manifest.json`, written by `coca-data`, records what each shard holds, so that damage and silent changes are noticed:
sizes are compared when a training starts, the digest when a shard is indexed or fetched.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, NamedTuple

from filelock import FileLock

from coca_lit.errors import DataError
from coca_lit.files import atomic_write, size_and_time
from coca_lit.machine import cache_folder
from coca_lit.reading import MAX_JSON, is_int64, open_regular, parse_json, printable, read_bounded

if TYPE_CHECKING:
    from coca_lit.data.shards.selection import Selection

INDEX_VERSION = 3
MANIFEST = "manifest.json"
REFUSED = (
    f"according to its {MANIFEST}: it was changed or damaged; copy it again, or accept it as it is with "
    "coca-data check --update"
)


class ManifestEntry(NamedTuple):
    """What a manifest records about one shard."""

    samples: int  # usable ones
    bytes: int
    sha256: str


Manifest = Mapping[str, ManifestEntry]  # by file name


class Stamp(NamedTuple):
    """The state of a shard when it was indexed."""

    version: int  # of the format of indexes
    bytes: int
    changed_at: int  # modification time in ns, 0 of a remote one
    content: str  # sha256 from its manifest, else the version of a remote one, else ""


class CacheSettings(NamedTuple):
    """Of the local copies of remote shards."""

    folder: Path = cache_folder() / "shards"
    max_bytes: int = 100 * 10**9
    patience: float = 600.0  # seconds without an answer of the store


@contextmanager
def locked_cache(folder: Path, lock: str) -> Iterator[None]:
    """Makes the folder of a cache and holds a lock in it; raises `DataError` if it is another user's."""
    held = FileLock(folder / lock)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written: {error.strerror or error}; set data.cache_dir to a folder of yours"
        ) from error
    try:
        yield
    finally:
        held.release()


class ChangedError(Exception):
    """A shard is not the one that was listed or indexed."""


@dataclass(frozen=True)
class Shard:
    """A tar file on a local disk, with its entry in the manifest of its folder if there is one. For remote ones see
    `coca_lit.data.shards.remote.shards`.
    """

    name: str  # a path; of a remote one the URL
    entry: ManifestEntry | None = None
    selection: "Selection | None" = None  # of the samples to read; None for all
    is_remote: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.name

    @property
    def file_name(self) -> str:
        return split(self.name)[1]

    @property
    def samples(self) -> int | None:
        """Number of usable samples to read, if a selection or a manifest says it."""
        if self.selection is not None:
            return self.selection.counts[self.file_name]
        return self.entry.samples if self.entry else None

    def stamp(self) -> Stamp:
        return Stamp(INDEX_VERSION, *size_and_time(self.name), self.entry.sha256 if self.entry else "")

    def open(self, stamp: Stamp) -> BinaryIO:
        """Raises `ChangedError` if the shard is not in that state, `OSError` if it cannot be read."""
        file = open_regular(self.name)
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (stamp.bytes, stamp.changed_at):
            file.close()
            raise ChangedError
        return file

    def local(self, verify: bool = False) -> AbstractContextManager[Path]:
        """A local file that stays there within the block.

        Args:
            verify: compare it with the manifest; raises `DataError` if it differs.
        """
        if verify and self.entry:
            check_digest(self.name, Path(self.name), self.entry)
        return nullcontext(Path(self.name))


def index_name(name: str) -> str:
    """Of the file beside a shard that holds its index, see `coca_lit.data.shards.index`."""
    return f".{name}.index"


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Raises `DataError` naming `where` if the content is not a manifest."""
    try:
        rows = parse_json(content, where, dict)["shards"]
        entries = {row["name"]: entry_of([row[field] for field in ManifestEntry._fields]) for row in rows}
        if any(printable(name) != name or "/" in name for name in entries):
            raise ValueError("the name of a shard")
    except (DataError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where} is not a manifest of shards: remove it, and write it with coca-data check") from error
    return entries


def entry_of(values: Any) -> ManifestEntry:
    """An entry from JSON; raises `ValueError` or `TypeError` if it cannot be one."""
    entry = ManifestEntry(*values)
    numbers = is_int64(entry.samples) and is_int64(entry.bytes) and min(entry.samples, entry.bytes) >= 0
    if not (numbers and isinstance(entry.sha256, str)):
        raise ValueError(f"expected two counts and a digest, got {values!r:.80}")
    return entry


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, empty if it has none."""
    path = folder / MANIFEST
    return parse_manifest(read_bounded(path, MAX_JSON, "cannot be read"), str(path)) if path.exists() else {}


def write_manifest(folder: Path, entries: Manifest) -> Path:
    """Replaces the manifest of a folder in one step."""
    path = folder / MANIFEST
    totals = {
        "samples": sum(entry.samples for entry in entries.values()),
        "bytes": sum(entry.bytes for entry in entries.values()),
    }
    rows = [{"name": name, **entries[name]._asdict()} for name in sorted(entries)]
    atomic_write(path, (json.dumps({**totals, "shards": rows}, indent=1) + "\n").encode())
    return path


def sha256_of(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(shard: str, path: Path, entry: ManifestEntry) -> None:
    """Raises `DataError` if the content is not what the manifest records."""
    if sha256_of(path) != entry.sha256:
        raise DataError(f"{shard} has another sha256 than {REFUSED}")


def split(name: str) -> tuple[str, str]:
    """(folder, file name) of a path or URL"""
    folder, _, last = name.replace(os.sep, "/").rpartition("/")
    return folder or ("/" if name.startswith("/") else "."), last
