"""Local copies of the shards of an object store, in a cache of limited size."""

import glob
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from coca_lit.data.shards.store import PATIENCE, ask
from coca_lit.errors import DataError

LOCK, READER = ".lock", ".reader"  # of the process that downloads a file, and of each that reads it
ROOM, PARTIAL = ".room", ".partial"  # reserved for a download, and fetched so far


class ShardCache(NamedTuple):
    """Copies of remote files in a local folder, shared by all processes of a machine.

    A file appears under its name when it is complete. The least recently used ones make room for new ones, but none
    that a process has open: each reader holds a lock of its own beside the file until it is done, or dies.
    """

    folder: Path
    max_bytes: int
    patience: float = PATIENCE  # seconds without an answer of the store

    @contextmanager
    def open(self, url: str) -> Iterator[Path]:
        """A local copy of `url` that stays there within the block.

        Raises:
            DataError: the cache is too small.
            StoreError, DataNotFoundError, FileNotFoundError: as `ask`.
        """
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

        def fetch(store: Any) -> None:
            size = store.size(url)
            try:
                self._reserve(url, room, size)
                store.get_file(url, str(partial))
                if partial.stat().st_size != size:
                    raise ConnectionError(f"{url} came with {partial.stat().st_size} of {size} bytes")
                with self.accounts():  # others count either the reservation or the file
                    partial.replace(path)
                    room.unlink(missing_ok=True)
            finally:
                partial.unlink(missing_ok=True)
                room.unlink(missing_ok=True)

        ask(url, self.patience, fetch)

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
