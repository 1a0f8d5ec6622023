"""Which shards a training reads: brace ranges, globs and lists, joined with the manifests beside the files.

Only paths and the URLs of a few object stores are accepted: a list of shards may come from a stranger, and to
webdataset `pipe:COMMAND` is a shard too.
"""

import functools
import glob
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from braceexpand import braceexpand

from coca_lit.data.records import not_found
from coca_lit.data.shards.shard import (
    MANIFEST,
    REFUSED,
    CacheSettings,
    Manifest,
    ManifestEntry,
    Shard,
    read_manifest,
    split,
)
from coca_lit.errors import DataError

if TYPE_CHECKING:
    from coca_lit.data.shards.remote.shards import RemoteFolder

    Folder: TypeAlias = "LocalFolder | RemoteFolder"

SCHEMES = ("s3", "gs", "hf", "https", "memory")  # of remote shards; memory: for tests
REQUESTS = 32  # to a store at a time
_HOW = (
    "write LAION or other image-text pairs with img2dataset --output_format webdataset, "
    "and name its folder or FOLDER/*.tar"
)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # a single letter is a drive of Windows


def is_remote(name: str) -> bool:
    return name.startswith(tuple(f"{scheme}://" for scheme in SCHEMES)) and "::" not in name


def find_shards(
    shards: str | Sequence[str], cache: CacheSettings | None = None, commits: dict[str, str] | None = None
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
    settings = cache or CacheSettings()

    @functools.cache
    def folders(name: str) -> "Folder":
        if not is_remote(name):
            return LocalFolder(Path(name))
        from coca_lit.data.shards.remote.shards import RemoteFolder

        return RemoteFolder(name, settings)

    found = []
    for name in _names(shards, folders, {} if commits is None else commits, settings.patience):
        folder, last = split(name)
        manifest = folders(folder).manifest
        entry = manifest.get(last)
        if manifest and not entry:
            raise DataError(
                f"{name} is not in the {MANIFEST} of its folder: remove it, or accept it with coca-data check --update"
            )
        if entry and (size := folders(folder).size(last)) != entry.bytes:
            raise DataError(f"{name} has {size:,} bytes, but {entry.bytes:,} {REFUSED}")
        found.append(folders(folder).shard(name, entry))
    return found


def local_shards(shards: str | Sequence[str]) -> list[Path]:
    """As `find_shards`, on local disks only and without comparing with a manifest."""
    patterns = [shards] if isinstance(shards, str) else list(shards)
    remote = [pattern for pattern in patterns if is_remote(pattern)]
    if remote:
        raise DataError(f"{remote[0]} is not on a local disk: copy the shards first")
    folders = functools.cache(lambda name: LocalFolder(Path(name), manifest={}))
    return [Path(name) for name in _names(patterns, folders, {})]


class LocalFolder:
    """Where shards lie on a disk."""

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        self.path = path
        self.manifest = read_manifest(path) if manifest is None else manifest

    def size(self, name: str) -> int | None:
        """Of a file in bytes; None if there is none."""
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def names(self, pattern: str) -> Iterable[str]:
        """The files that match a pattern."""
        return (file.name for file in self.path.glob(pattern) if file.is_file())

    def shard(self, name: str, entry: ManifestEntry | None) -> Shard:
        """The shard with this path."""
        return Shard(name, entry)


def _names(
    shards: str | Sequence[str], folders: Callable[[str], "Folder"], commits: dict[str, str], patience: float = 0
) -> list[str]:
    patterns = [shards] if isinstance(shards, str) else list(shards)
    expanded = [name for pattern in patterns for name in _expanded(pattern)]
    if any(name.startswith("hf://") for name in expanded):
        from coca_lit.data.shards.remote.store import at_commit

        expanded = [at_commit(name, commits, patience) for name in expanded]
    names = list(dict.fromkeys(match for name in expanded for match in _matches(name, folders)))
    parts = [split(name) for name in names]
    places = [folders(folder) for folder, _ in parts]
    with ThreadPoolExecutor(REQUESTS) as pool:  # a web server is asked for each of them
        sizes = pool.map(lambda place, part: place.size(part[1]), places, parts)
        missing = [name for name, size in zip(names, sizes, strict=True) if size is None]
    if missing or not names:
        what = f"{len(missing)} of {len(names)} shards" if missing else "shards"
        raise not_found(what, missing[:1] or patterns, _HOW)
    return names


def _expanded(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for, if its scheme is accepted."""
    pattern = pattern.removeprefix("file://")
    if not is_remote(pattern):
        pattern = pattern.replace(os.sep, "/")  # "\\" of Windows, which is an escape in a range
    scheme = _SCHEME.match(pattern)
    if scheme and not is_remote(pattern):
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES[:-1])
        raise DataError(f"shards are read from paths and {known}, not from {scheme.group()!r} as in {pattern!r}")
    if pattern.startswith("https://") and "@" in pattern.split("/")[2]:
        raise DataError("a URL of shards is printed and stored, so it must not hold a user and a password")
    if os.path.exists(pattern):  # braces are part of its name
        return [pattern]
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(
            f"{pattern!r} is not a range of shards like {{00000..00099}}.tar: a brace lacks its partner"
        ) from error


def _matches(name: str, folders: Callable[[str], "Folder"]) -> list[str]:
    """A pattern also covers the files that the manifest lists: a glob alone never notices that a shard is gone. Hidden
    files match only a pattern that begins with a dot, as in a shell.
    """
    if not is_remote(name) and os.path.isdir(name):
        name = f"{name}/*.tar"
    elif is_remote(name) and not name.endswith((".tar", "]", "*")):
        name = f"{name.rstrip('/')}/*.tar"
    if not glob.has_magic(name) or os.path.isfile(name):
        return [name]
    folder, last = split(name)
    if os.path.isdir(folder):  # brackets are part of its name
        if not glob.has_magic(last):
            return [name]
    elif glob.has_magic(folder):
        if is_remote(folder):
            raise DataError(f"{name}: only the last part of a URL may hold * and ?")
        parents = sorted({*glob.glob(folder, recursive=True), *(["."] if folder == "**" else [])})
        return [match for parent in parents for match in _matches(f"{parent.rstrip('/')}/{last}", folders)]
    found = folders(folder)
    listed = [entry for entry in found.manifest if fnmatch(entry, last)]
    matches = sorted({*found.names(last), *listed})
    return [f"{folder}/{match}" for match in matches if last.startswith(".") or not match.startswith(".")]
