"""Files that are either whole or not there, whenever a process is killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coca_lit.data.records import DataError


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
