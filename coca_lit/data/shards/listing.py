"""Which shards a training reads: brace ranges, globs and lists, joined with the manifests beside the files.

Paths and the URLs of a few object stores are accepted: a shard set may come from a stranger, and in webdataset's terms
`pipe:COMMAND` is a shard too.
"""

import functools
import glob
import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand

from coca_lit.data.records import not_found
from coca_lit.data.shards.cache import SCHEMES, ShardCache, is_remote, list_folder
from coca_lit.data.shards.manifest import NAME, Manifest, ManifestEntry, check_size, parse_manifest, read_manifest
from coca_lit.errors import DataError

_HOW = (
    "write LAION or other image-text pairs with img2dataset --output_format webdataset "
    'and pass "FOLDER/*.tar" as data.shards'
)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class Shard(NamedTuple):
    """A tar file, and what its manifest says about it if it has one."""

    name: str  # a path, or a URL
    entry: ManifestEntry | None = None
    cache: ShardCache | None = None  # of one that is far away

    def local(self) -> AbstractContextManager[Path]:
        """A local file that stays there within the block."""
        return self.cache.open(self.name) if self.cache else nullcontext(Path(self.name))


def find_shards(shards: str | Sequence[str], cache: ShardCache | None = None) -> list[Shard]:
    """The shards of "data/{00000..00099}.tar", "data/*.tar", a folder or a list of such, in order and each once, with
    their entries in the manifests of their folders, if there are any.

    Args:
        cache: for shards on an object store, such as "s3://bucket/laion/*.tar".

    Raises:
        DataNotFoundError: a shard that is named, or that matches and is in the manifest, does not exist.
        DataError: a scheme that is not accepted, or a shard that does not fit the manifest of its folder.
    """
    folders = functools.cache(_look_into)
    return [_join(name, folders, cache) for name in _names(shards, folders)]


def local_shards(shards: str | Sequence[str]) -> list[Path]:
    """The same on local disks, whatever a manifest says."""
    names = _names(shards, functools.cache(lambda folder: _look_into(folder)._replace(manifest={})))
    if far := [name for name in names if is_remote(name)]:
        raise DataError(f"{far[0]} is not on a local disk: copy the shards first")
    return [Path(name) for name in names]


def _names(shards: str | Sequence[str], folders: "Callable[[str], _Folder]") -> list[str]:
    patterns = [shards] if isinstance(shards, str) else list(shards)
    spelt_out = [name for pattern in patterns for name in braceexpand(_accepted(pattern))]
    names = list(dict.fromkeys(match for name in spelt_out for match in _matches(name, folders)))
    missing = [name for name in names if not _exists(name, folders)]
    if missing or not names:
        what = f"{len(missing)} of {len(names)} shards" if missing else "shards"
        raise not_found(what, missing[:1] or patterns, _HOW)
    return names


class _Folder(NamedTuple):
    sizes: Callable[[str], int | None]  # of a file, None if there is no such file
    names: Callable[[str], list[str]]  # that match a pattern
    manifest: Manifest


def _look_into(folder: str) -> _Folder:
    if is_remote(folder):
        listing = list_folder(folder)
        text = listing.text(NAME) if NAME in listing.sizes else None
        manifest = parse_manifest(text, f"{folder}/{NAME}") if text is not None else {}
        return _Folder(listing.sizes.get, listing.matches, manifest)
    path = Path(folder)
    return _Folder(lambda name: _size(path / name), lambda pattern: _glob(path, pattern), read_manifest(path))


def _matches(name: str, folders: Callable[[str], _Folder]) -> list[str]:
    """A pattern also covers what the manifest lists: a glob alone never notices that a shard is gone."""
    if not is_remote(name) and os.path.isdir(name):
        name = f"{name}/*.tar"
    elif is_remote(name) and not name.endswith((".tar", "]", "*")):
        name = f"{name.rstrip('/')}/*.tar"
    folder, last = _split(name)
    if not glob.has_magic(name):
        return [name]
    if glob.has_magic(folder):
        if is_remote(folder):
            raise DataError(f"{name}: only the last part of a URL may hold * and ?")
        return [match for parent in sorted(glob.glob(folder)) for match in _matches(f"{parent}/{last}", folders)]
    found = folders(folder)
    listed = [entry for entry in found.manifest if fnmatch(entry, last)]
    return [f"{folder}/{match}" for match in sorted({*found.names(last), *listed})]


def _exists(name: str, folders: Callable[[str], _Folder]) -> bool:
    folder, last = _split(name)
    return folders(folder).sizes(last) is not None


def _join(name: str, folders: Callable[[str], _Folder], cache: ShardCache | None) -> Shard:
    folder, last = _split(name)
    found = folders(folder)
    far = cache if is_remote(name) else None
    if not found.manifest:
        return Shard(name, None, far)
    if last not in found.manifest:
        raise DataError(
            f"{name} is not in the {NAME} of its folder: remove it, or accept it with coca-data check --update"
        )
    check_size(name, found.sizes(last) or 0, found.manifest[last])
    return Shard(name, found.manifest[last], far)


def _split(name: str) -> tuple[str, str]:
    folder, _, last = name.rpartition("/")
    return folder or ("/" if name.startswith("/") else "."), last


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _glob(folder: Path, pattern: str) -> list[str]:
    return [path.name for path in folder.glob(pattern) if path.is_file()]


def _accepted(pattern: str) -> str:
    if pattern.startswith("file://"):
        return pattern.removeprefix("file://")
    if (scheme := _SCHEME.match(pattern)) and not is_remote(pattern):
        raise DataError(
            f"shards are read from local paths and from {', '.join(f'{scheme}://' for scheme in SCHEMES[:-1])} only, "
            f"not from {scheme.group()!r} as in {pattern!r}: copy or mount them first"
        )
    return pattern
