"""Shards on object stores (s3, gs, hf) through fsspec, read by way of a local cache that has a limit.

Only these schemes are accepted, without fsspec's chains of protocols: a URL may come from a stranger.
"""

import fcntl
import fnmatch
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from coca_lit.errors import DataError
from coca_lit.files import locked

SCHEMES = ("s3", "gs", "hf", "memory")  # memory: for tests
TRIES = 3  # of a download
LOCK, ROOM, PARTIAL = ".lock", ".room", ".partial"  # suffixes in the cache; held, reserved, and fetched so far


def is_remote(name: str) -> bool:
    return name.startswith(tuple(f"{scheme}://" for scheme in SCHEMES)) and "::" not in name


class RemoteFolder(NamedTuple):
    """What one listing says about a folder on an object store."""

    url: str
    sizes: Mapping[str, int]  # by file name

    def matches(self, pattern: str) -> list[str]:
        return sorted(name for name in self.sizes if fnmatch.fnmatchcase(name, pattern))

    def text(self, name: str) -> str:
        with _blame(self.url):
            return _filesystem(self.url).cat_file(f"{self.url}/{name}").decode()


def list_folder(url: str) -> RemoteFolder:
    """One request; raises `DataError` when the store cannot be reached. A folder that does not exist is empty."""
    with _blame(url):
        try:
            rows = _filesystem(url).ls(url, detail=True)
        except FileNotFoundError:
            rows = []
    return RemoteFolder(url, {row["name"].rpartition("/")[2]: row["size"] for row in rows if row["type"] == "file"})


class ShardCache(NamedTuple):
    """Copies of remote files in a local folder, shared by all processes of a machine.

    A file appears under its name when it is complete. The longest unused ones make room for new ones, but none that a
    process has open: a reader holds a shared lock on its file, and only a file that can be locked alone is removed.
    """

    folder: Path
    max_bytes: int

    @contextmanager
    def open(self, url: str) -> Iterator[Path]:
        """A local copy of `url` that stays there within the block. Raises `DataError` if the cache is too small."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{url.rpartition('/')[2]}"
        while (file := _open_shared(path)) is None:
            with locked(_of(path, LOCK)):  # one process downloads, the others wait
                if not path.exists():
                    self._download(url, path)
        with file:
            os.utime(path)
            yield path

    def _download(self, url: str, path: Path) -> None:
        """By the process that holds the lock of `path`."""
        partial, room = _of(path, PARTIAL), _of(path, ROOM)
        for attempt in range(1, TRIES + 1):
            try:
                with _blame(url):
                    filesystem = _filesystem(url)
                    size = filesystem.size(url)
                    self._reserve(url, room, size)
                    filesystem.get_file(url, str(partial))
                if partial.stat().st_size != size:
                    raise OSError(f"{url} came with {partial.stat().st_size} of {size} bytes")
                with self.accounts():  # who adds up sees the reservation or the file
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
        """Takes room with a file of that size, which other processes count; removes files until there is some."""
        with self.accounts():
            files = sorted(self._files(), key=lambda file: file[1].st_mtime)
            used = sum(status.st_size for _, status in files)
            for path, status in files:
                if used + size <= self.max_bytes:
                    break
                if _remove_unless_used(path):
                    used -= status.st_size
            if used + size > self.max_bytes:
                limit, wanted = (f"{number / 1e9:.3g} GB" for number in (self.max_bytes, size))
                raise DataError(
                    f"the cache {self.folder} of {limit} has no room for {url} ({wanted}) beside the shards that are "
                    "being read: raise data.cache_gb, at least to one shard per worker"
                )
            with room.open("wb") as file:
                file.truncate(size)  # takes no blocks on the disk

    def accounts(self) -> AbstractContextManager[None]:
        """One process at a time adds up and changes what takes room."""
        return locked(self.folder / ".accounts.lock")

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """What takes room: whole files, and the reservations of those that are being fetched."""
        for path in self.folder.iterdir():
            if path.suffix not in (LOCK, PARTIAL) and not path.is_dir():
                with suppress(FileNotFoundError):
                    yield path, path.stat()


def _open_shared(path: Path) -> IO[bytes] | None:
    """The file with a shared lock; None if it is not there, or no longer."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    if os.fstat(file.fileno()).st_nlink:
        return file
    file.close()  # removed between opening and locking
    return None


def _remove_unless_used(path: Path) -> bool:
    """Removes a file that no process reads, or a reservation whose process is gone."""
    with suppress(FileNotFoundError), (_of(path, LOCK) if path.suffix == ROOM else path).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink(missing_ok=True)
    return True


def _of(path: Path, suffix: str) -> Path:
    """The lock, the reservation or the part of a file in the cache; `path` may be one of them."""
    name = path.name.removesuffix(ROOM) if path.suffix == ROOM else path.name
    return path.with_name(name + suffix)


def _filesystem(url: str) -> Any:
    import fsspec

    return fsspec.filesystem(url.partition("://")[0])


@contextmanager
def _blame(url: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise DataError(f"{url} needs an optional package: pip install 'coca_lit[remote]' ({error})") from error
    except PermissionError as error:
        raise DataError(f"{url} cannot be read with these credentials: {error}") from error
