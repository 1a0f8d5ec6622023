"""Which shards a training reads: brace ranges, globs and lists, joined with the manifests beside the files.

Only paths are accepted: a shard set may come from a stranger, and in webdataset's terms `pipe:COMMAND` is a shard too.
"""

import glob
import os
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand

from coca_lit.data.manifest import NAME, Manifest, ManifestEntry, check_size, read_manifest
from coca_lit.data.records import DataError, not_found

_HOW = (
    "write LAION or other image-text pairs with img2dataset --output_format webdataset "
    'and pass "FOLDER/*.tar" as data.shards'
)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class Shard(NamedTuple):
    """A tar file, and what its manifest says about it if it has one."""

    path: Path
    entry: ManifestEntry | None = None

    @property
    def name(self) -> str:
        """For messages and reports."""
        return str(self.path)


def find_shards(shards: str | Sequence[str]) -> list[Shard]:
    """The shards of `list_shards`, each with its entry in the manifest of its folder, if there is one.

    Raises:
        DataNotFoundError: a shard that is named, or that matches and is in the manifest, does not exist.
        DataError: anything but local paths and file://, or a shard that does not fit the manifest of its folder.
    """
    manifest = cache(read_manifest)
    return [_join(path, manifest(path.parent)) for path in list_shards(shards, manifest)]


def list_shards(shards: str | Sequence[str], manifest: Callable[[Path], Manifest] = lambda folder: {}) -> list[Path]:
    """Paths of "data/{00000..00099}.tar", "data/*.tar", a folder or a list of such, in order and each once.

    Args:
        manifest: of a folder. What it lists and a pattern covers must be there: a glob alone never notices a loss.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    paths: dict[Path, None] = {}
    for pattern in patterns:
        for name in braceexpand(_local(pattern)):
            name = f"{name}/*.tar" if os.path.isdir(name) else name
            paths.update((path, None) for path in (_matches(name, manifest) if glob.has_magic(name) else [Path(name)]))
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        what = f"{len(missing)} of {len(paths)} shards" if missing else "shards"
        where: list[Path | str] = [*missing[:1]] or [*patterns]
        raise not_found(what, where, _HOW)
    return list(paths)


def _matches(pattern: str, manifest: Callable[[Path], Manifest]) -> list[Path]:
    folder, _, name = pattern.rpartition("/")
    listed = [] if glob.has_magic(folder) else [n for n in manifest(Path(folder)) if fnmatch(n, name)]
    return sorted({*map(Path, glob.glob(pattern)), *(Path(folder, n) for n in listed)})


def _join(path: Path, manifest: Manifest) -> Shard:
    if not manifest:
        return Shard(path)
    if path.name not in manifest:
        raise DataError(
            f"{path} is not in the {NAME} of its folder: remove it, or accept it with coca-data check --update"
        )
    check_size(str(path), os.path.getsize(path), manifest[path.name])
    return Shard(path, manifest[path.name])


def _local(pattern: str) -> str:
    if pattern.startswith("file://"):
        return pattern.removeprefix("file://")
    if scheme := _SCHEME.match(pattern):
        raise DataError(
            f"shards are read from local paths and file:// only, not from {scheme.group()!r} as in {pattern!r}: "
            "copy or mount them first"
        )
    return pattern
