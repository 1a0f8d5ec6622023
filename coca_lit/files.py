"""Files that survive a kill at any moment: they are complete or absent, and appended files end with a complete line.

Everything that the project writes in order to resume from it later is written by these functions.
"""

import csv
import errno
import glob
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import FileIO, StringIO
from pathlib import Path
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from coca_lit.errors import DataError
from coca_lit.reading import MAX_JSON, open_regular

T = TypeVar("T")
TEMPORARY = ".coca_lit-tmp"  # ends names of unfinished files and folders; in these it is a file, too
OLD = 3600.0  # seconds after which nobody is still writing an unfinished file
_OURS = re.compile(rf"\..+\.(\d+)-([0-9a-f]{{8}})-[0-9a-f]{{8}}{re.escape(TEMPORARY)}", re.DOTALL)
_FORMULA = re.compile(r"[=+@\t\r-]")
_NUMBER = re.compile(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", re.IGNORECASE)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # of file systems that cannot sync a folder
log = logging.getLogger(__name__)
_all_waiting: "WeakSet[Waiting[Any]]" = WeakSet()


def is_leftover(path: Path) -> bool:
    """Whether a killed process of ours left this unfinished: a file with a name that only `replacing` gives, or a
    folder with a mark as well, see `temporary_folder`.
    """
    if path.is_dir() and not path.is_symlink():
        return path.name.endswith(TEMPORARY) and (path / TEMPORARY).is_file()
    return _OURS.fullmatch(path.name) is not None


def remove_leftovers(folder: Path, name: str = "*", older: float = 0.0) -> None:
    """Removes what killed processes left unfinished in a folder that is ours.

    Args:
        name: a pattern of final names.
        older: seconds since a file changed last; what is newer stays, where other processes may be at work, unless its
            writer was a process of this machine and has ended.
    """
    for path in folder.glob(f".{name}.*{TEMPORARY}"):
        with suppress(OSError):  # whoever was at work has given it its name, or it is another user's
            age = time.time() - path.lstat().st_mtime
            if is_leftover(path) and (not older or age >= older or _writer_has_ended(path)):
                remove(path)


def _writer_has_ended(path: Path) -> bool:
    """Whether a process of this machine wrote an unfinished file, and is gone."""
    match = _OURS.fullmatch(path.name)
    if match is None or match[2] != _machine():
        return False
    return has_ended(int(match[1]))


def has_ended(process: int) -> bool:
    """Whether this machine has no process of that number. Windows, which cannot be asked, says no."""
    if os.name == "nt":
        return False
    try:
        os.kill(process, 0)  # asks, and sends nothing
    except (OSError, OverflowError) as error:
        return isinstance(error, ProcessLookupError)
    return False


@cache
def _machine() -> str:
    """A digest of what shares the numbers of processes: a machine since its start, or a container on it."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # Linux has these
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


def temporary_folder(path: Path) -> Path:
    """Where several processes together write a folder that will become `path`. The first file in it is `TEMPORARY`,
    which marks it for `remove_leftovers`; whoever gives it its name removes the mark.
    """
    return path.with_name(f".{path.name}.ranks{TEMPORARY}")


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which replaces `path` when the block ends without an error.

    It is synced first, so that a crash of the machine leaves either the old content or the new one. What killed
    processes left of `path` is removed.

    Raises:
        DataError: nothing can be written there.
    """
    temporary = beside(path)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, glob.escape(path.name), OLD)
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        try:
            yield temporary
            if temporary.stat().st_mode & 0o777 != mode:  # safetensors makes files that their owner alone can read
                with suppress(OSError):  # on a file system without modes
                    temporary.chmod(mode)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            durable_rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes) -> None:
    """Writes a file that is complete or absent, also after a crash; raises as `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """`atomic_write` of indented JSON."""
    atomic_write(path, (json.dumps(content, indent=2) + "\n").encode())


def atomic_link(link: Path, target: Path) -> None:
    """Makes `link` another name of a file beside it, replacing in one step whatever was there: a symbolic link, or a
    hard link or a copy where the system has none, as Windows does without the right to them.

    Raises:
        DataError: nothing can be written there.
    """
    temporary = beside(link)
    with write_errors(link):
        temporary.unlink(missing_ok=True)
        try:
            os.symlink(target.name, temporary)
        except (OSError, NotImplementedError):
            try:
                os.link(target, temporary)
            except (OSError, NotImplementedError):
                shutil.copyfile(target, temporary)
        try:
            durable_rename(temporary, link)
        finally:
            temporary.unlink(missing_ok=True)


def durable_rename(temporary: Path, path: Path) -> None:
    """In one step and durably: until the folder is synced, a crash could undo it."""
    os.replace(temporary, path)
    if os.name == "nt":  # where folders cannot be opened
        return
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except PermissionError:  # it may be written to and not read
        return
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(folder)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Appends lines and hands them to the operating system, all or none; an incomplete last line of an earlier crash is
    removed.

    Raises:
        DataError: nothing can be written there.
    """
    rest = memoryview("".join(f"{line}\n" for line in lines).encode())
    end = None
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("a+b", buffering=0) as file:
                end = _remove_incomplete_line(file)
                while rest:
                    rest = rest[file.write(rest) :]
        except OSError:
            if end is not None:
                with suppress(OSError):
                    os.truncate(path, end)
            raise


class Waiting(Generic[T]):
    """Rows that wait in memory while a file cannot be written, on a full disk for example: with one warning, and
    another try whenever a row is added.

    Args:
        path: the file, for the warning.
        write: appends all of the given rows, or raises `DataError` and appends none.
    """

    def __init__(self, path: Path, write: Callable[[list[T]], None]) -> None:
        self.path = path
        self.write = write
        self.rows: list[T] = []
        self._warned = False
        _all_waiting.add(self)

    def add(self, *rows: T) -> None:
        self.rows += rows
        self.flush()

    def flush(self, last: bool = False) -> None:
        """Tries to write what waits. With `last`, a warning says what is lost if that fails."""
        if not self.rows:
            return
        try:
            self.write(self.rows)
        except (DataError, OSError) as error:  # OSError: what is there cannot be read just now
            if last:
                log.warning("%s; %d rows are lost", error, len(self.rows))
                self.rows = []
            elif not self._warned:
                log.warning("%s; the run continues, and the rows wait in memory", error)
            self._warned = True
            return
        if self._warned:
            log.warning("%s can be written again: %d rows were added", self.path, len(self.rows))
        self.rows = []
        self._warned = False


def retry_waiting_rows() -> None:
    """Another try for all rows that wait."""
    for waiting in list(_all_waiting):
        waiting.flush()


def write_waiting() -> None:
    """Writes all rows that still wait; raises `DataError` if some of them cannot be written."""
    retry_waiting_rows()
    for waiting in list(_all_waiting):
        if waiting.rows:
            raise DataError(f"cannot write {waiting.path}, for which {len(waiting.rows)} rows wait")


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


def size_and_time(file: str | Path | int) -> tuple[int, int]:
    """Size in bytes and time of change in ns of a file, by its path or descriptor. Raises `OSError` if it cannot be
    read, `ValueError` for what is no path.
    """
    about = os.stat(file)
    return about.st_size, about.st_mtime_ns


def state_of(file: Path | int) -> tuple[int, int] | tuple[()]:
    """`size_and_time` of a file, or nothing if it cannot be read."""
    try:
        return size_and_time(file)
    except (OSError, ValueError):
        return ()


def spreadsheet_text(value: Any) -> Any:
    """A value for a table of CSV: a text that a spreadsheet would run as a formula gets an apostrophe before it."""
    is_formula = isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value)
    return f"'{value}" if is_formula else value


def csv_line(row: Iterable[Any]) -> str:
    """A row for `append_lines`."""
    text = StringIO()
    csv.writer(text, lineterminator="").writerow(row)
    return text.getvalue()


def beside(path: Path) -> Path:
    """A new temporary path beside another, which `remove_leftovers` knows."""
    return path.with_name(f".{path.name}.{os.getpid()}-{_machine()}-{secrets.token_hex(4)}{TEMPORARY}")


def _remove_incomplete_line(file: FileIO) -> int:
    """The end of the file after that, in bytes."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            file.truncate(start + found + 1)
            return start + found + 1
        end = start
    file.truncate(0)
    return 0


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns an error of writing a file into a `DataError` that names it."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    except Exception as error:
        from safetensors import SafetensorError  # has its own for a full disk

        if not isinstance(error, SafetensorError):
            raise
        raise DataError(f"cannot write {path}: {error}") from error
