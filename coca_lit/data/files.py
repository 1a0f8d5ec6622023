"""Writing files in a way that a crash cannot spoil."""

import os
from collections.abc import Iterable
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """A file that is there with all its content or not at all: written beside its place, then renamed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Adds lines; one that an earlier crash cut off stays a line of its own."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write("".join(f"{line}\n" for line in lines).encode())
