"""Which shards a training reads: brace ranges, globs and lists, joined with the manifests beside the files.

`manifest.json`, written by `coca-data`, records what each shard holds, so that damage and silent changes are noticed:
sizes are compared when a training starts, the digest just before a shard is read, once per epoch, which costs less
than a hundredth of decoding its images.

Only paths and the URLs of a few object stores are accepted: a list of shards may come from a stranger, and to
webdataset `pipe:COMMAND` is a shard too.
"""

import functools
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from braceexpand import braceexpand

from coca_lit.data.records import not_found
from coca_lit.data.shards.cache import ShardCache
from coca_lit.data.shards.selection import Selection
from coca_lit.data.shards.store import PATIENCE, SCHEMES, Stored, at_commit, is_remote, list_folder
from coca_lit.errors import DataError
from coca_lit.files import atomic_write
from coca_lit.reading import MAX_JSON, is_int64, open_regular, parse_json, printable

MANIFEST = "manifest.json"
REQUESTS = 32  # to a store at a time
_HOW = (
    "write LAION or other image-text pairs with img2dataset --output_format webdataset, "
    "and name its folder or FOLDER/*.tar"
)
_REFUSED = (
    f"according to its {MANIFEST}: it was changed or damaged; copy it again, or accept it as it is with "
    "coca-data check --update"
)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class ManifestEntry(NamedTuple):
    """What a manifest records about one shard."""

    samples: int  # usable ones
    bytes: int
    sha256: str


Manifest = Mapping[str, ManifestEntry]  # by file name


class Shard(NamedTuple):
    """A tar file, with its entry in the manifest of its folder if there is one."""

    name: str  # a path, or a URL
    entry: ManifestEntry | None = None
    cache: ShardCache | None = None  # of a remote shard
    stored: Stored | None = None  # a remote shard as its store listed it
    index_file: Stored | None = None  # beside a remote shard, if there is a manifest to compare it with
    selection: Selection | None = None  # of the samples to read; None for all

    def __str__(self) -> str:
        return self.name

    @property
    def file_name(self) -> str:
        return _split(self.name)[1]

    @property
    def samples(self) -> int | None:
        """Number of usable samples to read, if a selection or a manifest says it."""
        if self.selection is not None:
            return self.selection.counts[self.file_name]
        return self.entry.samples if self.entry else None

    def local(self, verify: bool = False) -> AbstractContextManager[Path]:
        """A local file that stays there within the block; raises as `ShardCache.open`.

        Args:
            verify: compare a remote one with its manifest when it is fetched; raises `DataError` if it differs.
        """
        if not self.cache:
            return nullcontext(Path(self.name))
        entry = self.entry if verify else None
        check = functools.partial(check_digest, self.name, entry=entry) if entry else None
        return self.cache.open(self.name, self.stored, check)


def index_name(name: str) -> str:
    """Of the file beside a shard that holds its index, see `coca_lit.data.shards.indexed`."""
    return f".{name}.index"


def find_shards(
    shards: str | Sequence[str], cache: ShardCache | None = None, commits: dict[str, str] | None = None
) -> list[Shard]:
    """The shards of "data/{00000..00099}.tar", "data/*.tar", a folder or a list of these, in order and each once, with
    their entries in the manifests of their folders.

    Args:
        cache: for shards on an object store, such as "s3://bucket/laion/*.tar".
        commits: at which data sets on the Hub are read, see `at_commit`; all of them stay at one commit.

    Raises:
        DataNotFoundError: a shard that is named, or that matches and is in the manifest, does not exist.
        DataError: a scheme that is not accepted, a brace without its partner, or a shard that does not match its
            manifest.
    """
    patience, commits = cache.patience if cache else PATIENCE, {} if commits is None else commits
    folders = functools.cache(functools.partial(_look_into, patience=patience))
    return [_join(name, folders, cache) for name in _names(shards, folders, commits, patience)]


def selected(shards: Sequence[Shard], selection: Selection) -> list[Shard]:
    """The shards that hold samples of a selection.

    Raises:
        DataError: there are none, or two shards have the same file name.
    """
    names: dict[str, str] = {}
    for shard in shards:
        if names.setdefault(shard.file_name, shard.name) != shard.name:
            raise DataError(
                f"{names[shard.file_name]} and {shard.name} have the same file name, by which a selection knows "
                "shards: name the sets as a mixture, each with its own selection"
            )
    found = [shard._replace(selection=selection) for shard in shards if shard.file_name in selection.counts]
    if not found:
        raise DataError(f"{selection.path} selects no sample of the {len(shards)} shards: it is about other ones")
    return found


def local_shards(shards: str | Sequence[str]) -> list[Path]:
    """As `find_shards`, on local disks only and without comparing with a manifest."""
    names = _names(shards, functools.cache(lambda folder: _look_into(folder)._replace(manifest={})), {})
    if remote := [name for name in names if is_remote(name)]:
        raise DataError(f"{remote[0]} is not on a local disk: copy the shards first")
    return [Path(name) for name in names]


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Raises `DataError` naming `where` if the content is not a manifest."""
    try:
        rows = parse_json(content, where, dict)["shards"]
        entries = {row["name"]: entry_of([row[field] for field in ManifestEntry._fields]) for row in rows}
        if all(printable(name) == name and "/" not in name for name in entries):
            return entries
    except (DataError, ValueError, KeyError, TypeError) as error:
        raise _no_manifest(where) from error
    raise _no_manifest(where)


def entry_of(values: Any) -> ManifestEntry:
    """An entry from JSON; raises `ValueError` or `TypeError` if it cannot be one."""
    entry = ManifestEntry(*values)
    if not (is_int64(entry.samples) and is_int64(entry.bytes) and isinstance(entry.sha256, str)):
        raise ValueError("counts must be whole numbers, and the digest a text")
    if entry.samples < 0 or entry.bytes < 0:
        raise ValueError("counts cannot be below 0")
    return entry


def _no_manifest(where: str) -> DataError:
    return DataError(f"{where} is not a manifest of shards: remove it, then write it again with coca-data check")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, empty if it has none."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        with open_regular(path) as file:
            return parse_manifest(file.read(MAX_JSON + 1), str(path))
    except OSError as error:
        raise _no_manifest(str(path)) from error


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
        raise DataError(f"{shard} has another sha256 than {_REFUSED}")


class _Folder(NamedTuple):
    file: Callable[[str], Stored | None]  # None if there is no such file
    names: Callable[[str], list[str]]  # that match a pattern
    manifest: Manifest


def _look_into(folder: str, patience: float = PATIENCE) -> _Folder:
    if is_remote(folder):
        listing = list_folder(folder, patience)
        found = listing.file(MANIFEST)
        manifest = parse_manifest(listing.read(MANIFEST, found.bytes), f"{folder}/{MANIFEST}") if found else {}
        return _Folder(functools.cache(listing.file), listing.matches, manifest)
    path = Path(folder)

    @functools.cache
    def file(name: str) -> Stored | None:
        return Stored((path / name).stat().st_size, "") if (path / name).is_file() else None

    def names(pattern: str) -> list[str]:
        return [file.name for file in path.glob(pattern) if file.is_file()]

    return _Folder(file, names, read_manifest(path))


def _names(
    shards: str | Sequence[str], folders: Callable[[str], _Folder], commits: dict[str, str], patience: float = PATIENCE
) -> list[str]:
    patterns = [shards] if isinstance(shards, str) else list(shards)
    expanded = [at_commit(name, commits, patience) for pattern in patterns for name in _expanded(_accepted(pattern))]
    names = list(dict.fromkeys(match for name in expanded for match in _matches(name, folders)))
    asked = [(folders(folder), last) for folder, last in map(_split, names)]
    with ThreadPoolExecutor(REQUESTS) as pool:  # a web server is asked for each of them
        found = pool.map(lambda of: of[0].file(of[1]), asked)
        missing = [name for name, file in zip(names, found, strict=True) if file is None]
    if missing or not names:
        what = f"{len(missing)} of {len(names)} shards" if missing else "shards"
        raise not_found(what, missing[:1] or patterns, _HOW)
    return names


def _expanded(pattern: str) -> list[str]:
    if os.path.exists(pattern):  # braces are part of its name
        return [pattern]
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(
            f"{pattern!r} is not a range of shards like {{00000..00099}}.tar: a brace lacks its partner"
        ) from error


def _matches(name: str, folders: Callable[[str], _Folder]) -> list[str]:
    """A pattern also covers the files that the manifest lists: a glob alone never notices that a shard is gone."""
    if not is_remote(name) and os.path.isdir(name):
        name = f"{name}/*.tar"
    elif is_remote(name) and not name.endswith((".tar", "]", "*")):
        name = f"{name.rstrip('/')}/*.tar"
    if not glob.has_magic(name) or os.path.isfile(name):
        return [name]
    folder, last = _split(name)
    if os.path.isdir(folder):  # brackets are part of its name
        if not glob.has_magic(last):
            return [name]
    elif glob.has_magic(folder):
        if is_remote(folder):
            raise DataError(f"{name}: only the last part of a URL may hold * and ?")
        return [match for parent in sorted(glob.glob(folder)) for match in _matches(f"{parent}/{last}", folders)]
    found = folders(folder)
    listed = [entry for entry in found.manifest if fnmatch(entry, last)]
    return [f"{folder}/{match}" for match in sorted({*found.names(last), *listed})]


def _join(name: str, folders: Callable[[str], _Folder], cache: ShardCache | None) -> Shard:
    """A shard with its entry in the manifest, whose size it must have."""
    folder, last = _split(name)
    found = folders(folder)
    cache = cache if is_remote(name) else None
    file = found.file(last) or Stored(0, "")
    if not found.manifest:
        return Shard(name, None, cache, file if cache else None)
    if last not in found.manifest:
        raise DataError(
            f"{name} is not in the {MANIFEST} of its folder: remove it, or accept it with coca-data check --update"
        )
    entry = found.manifest[last]
    if file.bytes != entry.bytes:
        raise DataError(f"{name} has {file.bytes:,} bytes, but {entry.bytes:,} {_REFUSED}")
    return Shard(name, entry, cache, file, found.file(index_name(last))) if cache else Shard(name, entry)


def _split(name: str) -> tuple[str, str]:
    folder, _, last = name.rpartition("/")
    return folder or ("/" if name.startswith("/") else "."), last


def _accepted(pattern: str) -> str:
    if pattern.startswith("file://"):
        return pattern.removeprefix("file://")
    if (scheme := _SCHEME.match(pattern)) and not is_remote(pattern):
        raise DataError(
            f"shards are read from local paths and from {', '.join(f'{scheme}://' for scheme in SCHEMES[:-1])} only, "
            f"not from {scheme.group()!r} as in {pattern!r}: copy or mount them first"
        )
    if pattern.startswith("https://") and "@" in pattern.split("/")[2]:
        raise DataError("a URL of shards is printed and stored, so it must not hold a user and a password")
    return pattern
