"""MATLAB's level 5 files, as data: texts, numbers, cells and structures, such as Pascal-50S is published in.

`scipy.io.loadmat` reads the same, but cells in 10,000 cells crash its process, and what a compressed part claims is
allocated (see "MAT-File Format", MathWorks, for the tags). Here depth, elements and bytes have bounds.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from coca_lit.errors import DataError
from coca_lit.reading import UnsafeError, read_bounded

MAX_BYTES = 256 * 2**20  # also when unpacked; Pascal-50S takes about 150 MB
MAX_ARRAYS = 2_000_000  # Pascal-50S has 1.4 million
MAX_NESTING = 8  # arrays within each other; Pascal-50S has three
MATRIX, COMPRESSED, UTF8 = 14, 15, 16
NUMBERS = {
    **{1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"},
    **{UTF8: "u1", 17: "u2", 18: "u4"},  # texts
}
CELL, STRUCTURE, TEXT = 1, 2, 4  # classes of arrays
NUMERIC = range(6, 16)
TAG = 8  # bytes


def read_mat(path: Path) -> dict[str, Any]:
    """The arrays of a file by name. A text is a `str`, numbers are an array in MATLAB's order of axes, a cell is the
    list of its elements, a structure the list of its elements as dictionaries.

    Raises:
        DataError: it is no such file, is damaged, or exceeds the bounds.
    """
    content = memoryview(read_bounded(path, MAX_BYTES, "cannot be read"))
    found: dict[str, Any] = {}
    try:
        if len(content) < 128 or content[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):
            raise UnsafeError("it is no MATLAB file of level 5 (save it with -v7)")
        if content[126:128] != b"IM":
            raise UnsafeError("its bytes are in the order of other machines")
        left, reader = MAX_BYTES, _Arrays()
        for kind, part in _elements(content[128:], padded=False):
            if kind == COMPRESSED:
                stream = zlib.decompressobj()
                unpacked = stream.decompress(part, left + 1)  # 0 would stand for no limit
                if len(unpacked) > left:
                    raise UnsafeError(f"unpacked it has more than {left:,} bytes")
                left -= len(unpacked)
                ((kind, part),) = _elements(memoryview(unpacked))
            if kind == MATRIX:
                name, value = reader.read(part)
                found[name] = value
    except (UnsafeError, ValueError, OverflowError, struct.error, zlib.error) as error:
        raise DataError(f"{path} is not a readable MATLAB file: {error}") from error
    return found


def _elements(content: memoryview, padded: bool = True) -> Iterator[tuple[int, memoryview]]:
    """The data elements, each (type, bytes)."""
    while content:
        if len(content) < TAG:
            raise UnsafeError("it ends in the middle")
        kind, size = struct.unpack("<II", content[:TAG])
        if kind >> 16:  # up to four bytes are in the tag itself
            kind, size, start, step = kind & 0xFFFF, kind >> 16, 4, TAG
            if size > 4:
                raise UnsafeError("a small element has more than four bytes")
        else:
            start, step = TAG, TAG + (size + (-size % TAG if padded else 0))
        if start + size > len(content):
            raise UnsafeError("it ends in the middle")
        yield kind, content[start : start + size]
        content = content[step:]


class _Arrays:
    """Reads array elements, which may be within each other; counts them."""

    count = 0

    def read(self, content: memoryview, depth: int = 0) -> tuple[str, Any]:
        """The name and the value."""
        self.count += 1
        if self.count > MAX_ARRAYS:
            raise UnsafeError(f"it holds more than {MAX_ARRAYS:,} arrays")
        if depth > MAX_NESTING:
            raise UnsafeError(f"arrays are nested deeper than {MAX_NESTING} levels")
        if not len(content):  # MATLAB writes no more of an empty one
            return "", []
        parts = _elements(content)
        flags, shape, name = (_numbers(*part) for part in (next(parts, (0, content[:0])) for _ in range(3)))
        if not len(flags) or not len(shape) or shape.dtype.kind not in "iu" or (shape < 0).any():
            raise UnsafeError("an array has no class or size")
        kind, count = int(flags[0]) & 0xFF, math.prod(shape.tolist())
        called = bytes(name.astype("u1")).decode("latin-1")
        if kind == CELL:
            return called, self._members(parts, count, depth)
        if kind == STRUCTURE:
            lengths, names = (_numbers(*part) for part in (next(parts, (0, content[:0])) for _ in range(2)))
            if not len(lengths) or lengths[0] <= 0:
                raise UnsafeError("a structure has no fields")
            texts = bytes(names.astype("u1"))
            size = int(lengths[0])
            fields = [texts[i : i + size].split(b"\0")[0].decode("latin-1") for i in range(0, len(texts), size)]
            members, width = self._members(parts, count * len(fields), depth), len(fields) or 1
            rows = (members[i : i + width] for i in range(0, len(members), width))
            return called, [dict(zip(fields, row, strict=True)) for row in rows]
        if kind != TEXT and kind not in NUMERIC:
            raise UnsafeError(f"it holds an array of class {kind}, which is not read")
        stored, data = next(parts, (2, content[:0]))
        if kind == TEXT and stored == UTF8:
            return called, bytes(data).decode("utf-8", errors="replace")
        values = _numbers(stored, data)
        if len(values) != count:
            raise UnsafeError(f"an array of {count} elements holds {len(values)}")
        if kind == TEXT:
            return called, "".join(chr(code) for code in values.astype("u2").tolist())
        return called, values.reshape(shape, order="F")

    def _members(self, parts: Iterator[tuple[int, memoryview]], count: int, depth: int) -> list[Any]:
        members = []
        for kind, part in parts:
            if kind != MATRIX:
                raise UnsafeError("a member is no array")
            members.append(self.read(part, depth + 1)[1])
        if len(members) != count:
            raise UnsafeError(f"an array of {count} members holds {len(members)}")
        return members


def _numbers(kind: int, content: memoryview) -> np.ndarray:
    if kind not in NUMBERS:
        raise UnsafeError(f"it holds data of type {kind}")
    return np.frombuffer(content, np.dtype(NUMBERS[kind]).newbyteorder("<"))
