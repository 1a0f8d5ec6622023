"""Shards on object stores (s3, gs, hf) through fsspec, read through a local cache of limited size.

Only these schemes are accepted, and no chained protocols of fsspec: a URL may come from a stranger.
"""

import fnmatch
import glob
import hashlib
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from coca_lit.errors import DataError

SCHEMES = ("s3", "gs", "hf", "memory")  # memory: for tests
TRIES = 3  # of a download
LOCK, READER = ".lock", ".reader"  # of the process that downloads a file, and of each that reads it
ROOM, PARTIAL = ".room", ".partial"  # reserved for a download, and fetched so far


def is_remote(name: str) -> bool:
    return name.startswith(tuple(f"{scheme}://" for scheme in SCHEMES)) and "::" not in name


class RemoteFolder(NamedTuple):
    """The listing of a folder on an object store."""

    url: str
    sizes: Mapping[str, int]  # by file name

    def matches(self, pattern: str) -> list[str]:
        return sorted(name for name in self.sizes if fnmatch.fnmatchcase(name, pattern))

    def text(self, name: str) -> str:
        with _store_errors(self.url):
            return _filesystem(self.url).cat_file(f"{self.url}/{name}").decode()


def list_folder(url: str) -> RemoteFolder:
    """One request; raises `DataError` when the store cannot be reached. A folder that does not exist is empty."""
    with _store_errors(url):
        try:
            rows = _filesystem(url).ls(url, detail=True)
        except FileNotFoundError:
            rows = []
    return RemoteFolder(url, {row["name"].rpartition("/")[2]: row["size"] for row in rows if row["type"] == "file"})


class ShardCache(NamedTuple):
    """Copies of remote files in a local folder, shared by all processes of a machine.

    A file appears under its name when it is complete. The least recently used ones make room for new ones, but none
    that a process has open: each reader holds a lock of its own beside the file until it is done, or dies.
    """

    folder: Path
    max_bytes: int

    @contextmanager
    def open(self, url: str) -> Iterator[Path]:
        """A local copy of `url` that stays there within the block. Raises `DataError` if the cache is too small."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{url.rpartition('/')[2]}"
        reader = FileLock(_beside(path, f".{uuid.uuid4().hex}{READER}"))
        try:
            while not self._hold(path, reader):
                with FileLock(_beside(path, LOCK)):  # one process downloads, the others wait
                    if not path.exists():
                        self._download(url, path)
            yield path
        finally:
            reader.release()
            Path(reader.lock_file).unlink(missing_ok=True)

    def accounts(self) -> AbstractContextManager[Any]:
        """Held by the one process of a machine that adds up or changes what takes room."""
        return FileLock(self.folder / ".accounts.lock")

    def _hold(self, path: Path, reader: FileLock) -> bool:
        """Keeps a file in the cache while `reader` is locked; False if it is not there."""
        with self.accounts():
            if not path.exists():
                return False
            reader.acquire()
            os.utime(path)
            return True

    def _download(self, url: str, path: Path) -> None:
        """By the process that holds the download lock of `path`."""
        partial, room = _beside(path, PARTIAL), _beside(path, ROOM)
        for attempt in range(1, TRIES + 1):
            try:
                with _store_errors(url):
                    filesystem = _filesystem(url)
                    size = filesystem.size(url)
                    self._reserve(url, room, size)
                    filesystem.get_file(url, str(partial))
                if partial.stat().st_size != size:
                    raise OSError(f"{url} came with {partial.stat().st_size} of {size} bytes")
                with self.accounts():  # others count either the reservation or the file
                    partial.replace(path)
                    room.unlink()
                return
            except OSError:  # networks fail now and then
                if attempt == TRIES:
                    raise
                time.sleep(2.0 ** (attempt - 1))
            finally:
                partial.unlink(missing_ok=True)
                room.unlink(missing_ok=True)

    def _reserve(self, url: str, room: Path, size: int) -> None:
        """Reserves room by a file of that size, which other processes count; removes files until there is enough."""
        with self.accounts():
            files = sorted(self._files(), key=lambda file: file[1].st_mtime)
            used = sum(status.st_size for _, status in files)
            for path, status in files:
                if used + size <= self.max_bytes:
                    break
                if not _in_use(path):
                    path.unlink(missing_ok=True)
                    used -= status.st_size
            if used + size > self.max_bytes:
                limit, wanted = (f"{number / 1e9:.3g} GB" for number in (self.max_bytes, size))
                raise DataError(
                    f"the cache {self.folder} of {limit} has no room for {url} ({wanted}) beside the shards that are "
                    "being read: raise data.cache_gb, at least to one shard per worker"
                )
            with room.open("wb") as file:
                file.truncate(size)  # takes no blocks on the disk

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """What takes room: complete files, and the reservations of downloads."""
        for path in self.folder.iterdir():
            if path.suffix not in (LOCK, PARTIAL, READER) and not path.is_dir():
                with suppress(FileNotFoundError):
                    yield path, path.stat()


def _in_use(path: Path) -> bool:
    """Whether a process reads a file, or is about to fill a reservation; locks of dead processes are removed."""
    if path.suffix == ROOM:
        return _is_locked(path.with_suffix(LOCK))
    readers = [*path.parent.glob(f"{glob.escape(path.name)}.*{READER}")]
    held = [reader for reader in readers if _is_locked(reader)]
    for reader in {*readers} - {*held}:
        reader.unlink(missing_ok=True)
    return bool(held)


def _is_locked(path: Path) -> bool:
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _filesystem(url: str) -> Any:
    import fsspec

    return fsspec.filesystem(url.partition("://")[0])


@contextmanager
def _store_errors(url: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise DataError(f"{url} needs an optional package: pip install 'coca_lit[remote]' ({error})") from error
    except PermissionError as error:
        raise DataError(f"{url} cannot be read with these credentials: {error}") from error
