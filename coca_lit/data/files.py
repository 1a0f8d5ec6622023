"""Files that are either whole or not there, whenever a process is killed."""

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from coca_lit.data.records import DataError


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Removes temporary files that killed processes left in a folder; `name` is the pattern of what they were for."""
    for file in folder.glob(f".{name}.*.tmp"):
        file.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what the block wrote there takes the place of `path` when the block ends well.

    Raises:
        DataError: nothing can be written there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process of a machine at a time runs the block; the lock is given up when its process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_whole(path: Path, content: bytes) -> None:
    """A file that is there with all its content or not at all, also after a crash; raises as `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Adds lines; one that an earlier crash cut off stays a line of its own."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write("".join(f"{line}\n" for line in lines).encode())
