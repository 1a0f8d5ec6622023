"""The folder in which the views of own photos are kept for all runs of a user. What lies there can be made again: when
it takes more than `MAX_BYTES`, what was not used for longest is removed, and `coca-data cache` removes all of it.
"""

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from coca_lit.machine import cache_folder

MAX_BYTES = 20 * 10**9
IN_USE = 86_400.0  # seconds since a cache was used last in which a run may still read it


def view_folder() -> Path:
    return cache_folder() / "views"


def why_not_writable(folder: Path) -> str:
    """What keeps us from writing into a folder, which is made; nothing if we can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; of those that are gone meanwhile, none."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.lstat().st_size if path.is_file() else 0
    return total


def use(cache: Path) -> None:
    """Marks the cache of an encoder as used now. Of the others in `view_folder` it removes as many as are too much."""
    os.utime(cache)
    if cache.parent != view_folder():
        return
    others = [path for path in cache.parent.iterdir() if path.is_dir() and path != cache]
    sizes = {path: size_of(path) for path in others}
    total = size_of(cache) + sum(sizes.values())
    for path in sorted(others, key=lambda path: path.stat().st_mtime):
        if total > MAX_BYTES and time.time() - path.stat().st_mtime > IN_USE:
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]
