"""One process at a time in a run folder."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from coca_lit.errors import ConfigError, DataError
from coca_lit.files import atomic_write
from coca_lit.reading import read_json
from coca_lit.runs.launch import is_first_process

LOCK, HOLDER = ".lock", ".lock.json"
PATIENCE = 30.0  # seconds for the workers of a killed process to notice that it is gone


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Holds a run folder within the block; another process that wants it is refused. Only the first process of a run
    holds it.

    The lock is one of the operating system (`filelock.FileLock`, that is flock), because the system drops it with the
    process: after `kill -9`, and when a job is requeued on another machine, nothing is left to clean up. NFS 4 and
    Lustre carry it between machines. `SoftFileLock`, a file that merely exists, would outlive its process, and by
    filelock's documentation is recognised as stale only on the machine that made it; `FileLock` falls back to it where
    a file system has no flock.

    Raises:
        ConfigError: another process holds the folder, or it cannot be written.
    """
    if not is_first_process():
        yield
        return
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _acquire(lock, folder)
    except OSError as error:
        raise ConfigError(f"the run folder {folder} cannot be written: {error.strerror or error}") from error
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        with suppress(DataError):  # on a full disk the name is missing, and the lock holds all the same
            atomic_write(folder / HOLDER, json.dumps(holder).encode())
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        with suppress(OSError):
            if not os.path.getsize(folder / LOCK):  # else it is a SoftFileLock, which removes its file itself
                os.unlink(folder / LOCK)
        lock.release()
        with suppress(OSError):
            folder.rmdir()  # of a run that could not start


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = _holder(folder)
        try:
            lock.acquire(timeout=PATIENCE if _ended(holder) else 0)
        except Timeout as error:
            process, host, since = (holder.get(key, "unknown") for key in ("process", "host", "since"))
            raise ConfigError(
                f"the run folder {folder} is in use by process {process} on {host} since {since}: "
                "wait until it ends, or give this run another name"
            ) from error


def _holder(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / HOLDER, dict)
    except DataError:  # not written yet, or on a full disk not at all
        return {}


def _ended(holder: dict[str, Any]) -> bool:
    """Whether the process that took the lock is gone, and only processes that it started still hold it."""
    process = holder.get("process")
    if os.name == "nt" or holder.get("host") != socket.gethostname() or not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)  # asks, and sends nothing
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
