"""Files of JSON lines that a process may be killed while appending to."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from coca_lit.data.records import DataError


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds a line for each row; they are with the operating system when this returns."""
    try:
        with path.open("ab") as file:
            file.write("".join(f"{json.dumps(row)}\n" for row in rows).encode())
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def repair(path: Path) -> None:
    """Removes what follows the last line break: a line that was not finished."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 4096)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                file.truncate(start + found + 1)
                return
            end = start
        file.truncate(0)


def read_lines(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """The rows of the finished lines of a file, none if it is not there.

    Raises:
        DataError: a line is no JSON object with `key`.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield _row(line, f"line {number} of {path}", key)


def parts(path: Path) -> list[Path]:
    """The parts of a file that processes have left beside it."""
    found = (other for other in path.parent.iterdir() if other.name.startswith(f"{path.name}.rank"))
    return sorted(other for other in found if other.name.removeprefix(f"{path.name}.rank").isdigit())


def _row(line: bytes, where: str, key: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        row[key]
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f'{where} is not an object with a "{key}": repair or remove it') from error
    return row
