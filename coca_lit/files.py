"""Files that survive a kill at any moment: they are complete or absent, and appended files end with a complete line.

Everything that the project writes in order to resume from it later is written by these functions.
"""

import csv
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import IO, Any

from coca_lit.errors import DataError
from coca_lit.reading import MAX_JSON, open_regular


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Removes temporary files that killed processes left in a folder; `name` is a pattern of the final names."""
    for file in folder.glob(f".{name}.*.tmp"):
        file.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which replaces `path` when the block ends without an error.

    It is synced first, so that a crash of the machine leaves either the old content or the new one.

    Raises:
        DataError: nothing can be written there.
    """
    temporary = _beside(path)
    with _write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            _rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes) -> None:
    """Writes a file that is complete or absent, also after a crash; raises as `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def atomic_symlink(link: Path, target: Path) -> None:
    """Makes `link` a symbolic link to a file beside it, replacing in one step whatever was there."""
    temporary = _beside(link)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    _rename(temporary, link)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Appends lines and hands them to the operating system; an incomplete last line of an earlier crash is removed.

    Raises:
        DataError: nothing can be written there.
    """
    with _write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            _remove_incomplete_line(file)
            file.write("".join(f"{line}\n" for line in lines).encode())


def whole_lines(path: Path) -> Iterator[str]:
    """The lines of a file with their line breaks, none if it does not exist; without an incomplete last line.

    Raises:
        DataError: it cannot be read, or is no regular file.
    """
    if not path.exists():
        return
    try:
        with open_regular(path) as file:
            while line := file.readline(MAX_JSON):
                if line.endswith(b"\n"):
                    yield line.decode(errors="replace")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def csv_line(row: Iterable[Any]) -> str:
    """A row for `append_lines`."""
    text = StringIO()
    csv.writer(text, lineterminator="").writerow(row)
    return text.getvalue()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _rename(temporary: Path, path: Path) -> None:
    """In one step and durably: until the folder is synced, a crash could undo it."""
    os.replace(temporary, path)
    if os.name == "nt":  # where folders cannot be opened
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove_incomplete_line(file: IO[bytes]) -> None:
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            file.truncate(start + found + 1)
            return
        end = start
    file.truncate(0)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
