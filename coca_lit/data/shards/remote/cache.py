"""Local copies of the shards of an object store, in a cache of limited size."""

import glob
import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from coca_lit.data.shards.remote.store import Stored, ask, stored
from coca_lit.data.shards.shard import CacheSettings, ChangedError, locked_cache
from coca_lit.errors import DataError
from coca_lit.files import append_lines, csv_line

LOCK, READER = ".lock", ".reader"  # of the process that downloads a file, and of each that reads it
ROOM, PARTIAL = ".room", ".partial"  # reserved for a download, and fetched so far
LEAST_PATIENCE = 30.0  # seconds for a small request after a large one
FETCHED = "fetched.csv"  # time, url, bytes and seconds of everything that was fetched
_OURS = re.compile(r"[0-9a-f]{16}-")  # how copies begin: other files in the folder are the user's


class CacheFullError(DataError):
    """There is no room for another file."""


class ShardCache(CacheSettings):
    """Copies of remote files in a local folder, shared by all processes of a machine.

    A file appears under its name when it is complete. The least recently used ones make room for new ones, but none
    that a process has open: each reader holds a lock of its own beside the file until it is done, or dies.
    """

    __slots__ = ()

    @contextmanager
    def open(
        self, url: str, expected: Stored | None = None, check: Callable[[Path], None] | None = None
    ) -> Iterator[Path]:
        """A local copy of `url` that stays there within the block.

        Args:
            expected: the file to fetch, if not whatever is there.
            check: raises an error if the content of a file that was fetched is wrong.

        Raises:
            CacheFullError: the cache is too small.
            ChangedError: the store has another file than was expected.
            StoreError, FileNotFoundError: as `ask`.
        """
        path = self.path(url, expected)
        reader = FileLock(_beside(path, f".{uuid.uuid4().hex}{READER}"), thread_local=False)
        try:
            while True:
                with self.accounts():
                    if path.exists():
                        reader.acquire()  # keeps it in the cache
                        os.utime(path)
                        break
                with FileLock(_beside(path, LOCK)):  # one process downloads, the others wait
                    if not path.exists():
                        self._download(url, path, expected, check)
            yield path
        finally:
            reader.release()
            Path(reader.lock_file).unlink(missing_ok=True)

    def path(self, url: str, expected: Stored | None = None) -> Path:
        """Where the copy is, or will be."""
        key = f"{url}\n{expected.version}" if expected and expected.version else url
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}-{url.rpartition('/')[2]}"

    def record(self, url: str, size: int, began: float) -> None:
        """Notes bytes that were fetched since then, by `time.time`, in a table that people can add up."""
        line = csv_line([time.strftime("%Y-%m-%d %H:%M:%S"), url, size, round(time.time() - began, 3)])
        with self.accounts(), suppress(DataError):  # on a full disk
            append_lines(self.folder / FETCHED, [line])

    def accounts(self) -> AbstractContextManager[Any]:
        """Held by the one process of a machine that adds up or changes what takes room."""
        return locked_cache(self.folder, ".accounts.lock")

    def _download(self, url: str, path: Path, expected: Stored | None, check: Callable[[Path], None] | None) -> None:
        """By the process that holds the download lock of `path`."""
        partial = _beside(path, PARTIAL)
        room = _beside(path, ROOM)

        def download(store: Any) -> None:
            began = time.time()
            found = stored(store, url)
            if expected not in (None, found):
                raise ChangedError(f"{url} has changed since it was listed")
            size = found.bytes
            try:
                self._reserve(url, room, size)
                limit = {"size": size} if url.startswith("http") else {}
                store.get_file(url, str(partial), **limit)
                self.record(url, partial.stat().st_size, began)
                if partial.stat().st_size != size:
                    raise ConnectionError(f"{url} came with {partial.stat().st_size} of {size} bytes")
                # A throttled question must not cost the whole shard that has come.
                if ask(url, max(self.patience, LEAST_PATIENCE), lambda again: stored(again, url)) != found:
                    raise ChangedError(f"{url} has changed while it was fetched")
                if check:
                    check(partial)
                with self.accounts():  # others count either the reservation or the file
                    partial.replace(path)
                    room.unlink(missing_ok=True)
            finally:
                partial.unlink(missing_ok=True)
                room.unlink(missing_ok=True)

        ask(url, self.patience, download)

    def _reserve(self, url: str, room: Path, size: int) -> None:
        """Reserves room by a file of that size, which other processes count; removes files until there is enough."""
        with self.accounts():
            files: list[tuple[Path, os.stat_result]] = []
            for path in self.folder.iterdir():  # complete files, and the reservations of downloads
                if _OURS.match(path.name) and path.suffix not in (LOCK, PARTIAL, READER) and not path.is_dir():
                    with suppress(FileNotFoundError):
                        files.append((path, path.stat()))
            used = sum(status.st_size for _, status in files)
            for path, status in sorted(files, key=lambda file: file[1].st_mtime):
                if used + size <= self.max_bytes:
                    break
                if not _in_use(path):
                    path.unlink(missing_ok=True)
                    if path.suffix == ROOM:
                        path.with_suffix(PARTIAL).unlink(missing_ok=True)
                    used -= status.st_size
            if used + size > self.max_bytes:
                limit, wanted = (f"{number / 1e9:.3g} GB" for number in (self.max_bytes, size))
                raise CacheFullError(
                    f"the cache {self.folder} of {limit} has no room for {url} ({wanted}): raise data.cache_gb"
                )
            with room.open("wb") as file:
                file.truncate(size)  # takes no blocks on the disk


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
