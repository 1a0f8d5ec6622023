"""Reading files that may come from strangers: regular files only, of bounded size, as data and never as code."""

import bz2
import errno
import gzip
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedIOBase, BufferedReader, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from coca_lit.errors import DataError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

MAX_JSON = 64 * 2**20  # bytes of a file that a program wrote: settings, scores, a manifest, a line of a journal
MAX_FOOTER = 64 * 2**20  # bytes of the metadata of a Parquet file, and of any text in it
MAX_GROUP, MAX_GROUP_BYTES = 2**24, 2**30  # rows and bytes of the part of a Parquet file that is read at once
MAX_EXPANSION = 50  # times its size that a compressed file may grow to; shards of JPEGs grow by a tenth, JSON by five
ALWAYS = 64 * 2**20  # bytes that it may grow to in any case
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open}
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}


class UnsafeError(Exception):
    """A file holds what an honest one does not; reading stops there."""


def open_regular(path: str | Path) -> BufferedReader:
    """Opens a file for reading; raises `OSError` unless it is a regular one. A FIFO would block, a device never end."""
    file = FileIO(path, opener=_without_waiting)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return BufferedReader(file)


@contextmanager
def open_data(path: Path) -> Iterator[BinaryIO]:
    """The content of a regular file, decompressed if it is named .gz, .tgz or .bz2. Reading raises `UnsafeError` where
    it grows to more than `MAX_EXPANSION` times its size and more than `ALWAYS`.
    """
    if path.suffix == ".xz":  # its header alone can claim gigabytes of memory
        raise UnsafeError("xz is not read: compress it with gzip")
    with open_regular(path) as file:
        if path.suffix not in _OPENERS:
            yield file
            return
        with _OPENERS[path.suffix](file, "rb") as content:
            yield _Expanded(content, max(ALWAYS, MAX_EXPANSION * os.fstat(file.fileno()).st_size))  # type: ignore[misc]


def read_json(path: Path, kind: type = object, limit: int = MAX_JSON, keep_surrogates: bool = False) -> Any:
    """The content of a .json or .json.gz file.

    Args:
        limit: bytes of JSON.
        kind, keep_surrogates: see `parse_json`.

    Raises:
        DataError: there is no such file, or it is no regular file, too large, no JSON, or of another kind.
    """
    content = read_bounded(path, limit, "is not a readable JSON file")
    return parse_json(content, str(path), kind, keep_surrogates)


def read_bounded(path: Path, limit: int, problem: str) -> bytes:
    """The decompressed content of a file; raises `DataError` with `problem` and the reason if it cannot be read or
    holds more than `limit` bytes.
    """
    try:
        with open_data(path) as file:
            content = file.read(limit + 1)
    except (OSError, EOFError, zlib.error, UnsafeError) as error:
        raise DataError(f"{path} {problem}: {error}") from error
    if len(content) > limit:
        raise DataError(f"{path} {problem}: it holds more than {limit:,} bytes")
    return content


@contextmanager
def open_parquet(path: Path, texts: Sequence[str] = ()) -> "Iterator[ParquetFile]":
    """A regular Parquet file; its rows are read within the block, a row group at a time.

    Args:
        texts: columns of texts that repeat; a row of them takes a number and not a copy, however many a file claims.

    Raises:
        DataError: it is none, also where that shows in the block, it has larger row groups than `MAX_GROUP`, or the
            package that reads it is missing.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{path} needs an optional package: pip install 'coca_lit[prepare]'") from error
    limits = {"thrift_string_size_limit": MAX_FOOTER, "thrift_container_size_limit": MAX_FOOTER}
    try:
        with open_regular(path) as file:
            found = ParquetFile(file, read_dictionary=list(texts) or None, **limits)
            groups = [found.metadata.row_group(number) for number in range(found.num_row_groups)]
            if any(group.num_rows > MAX_GROUP or group.total_byte_size > MAX_GROUP_BYTES for group in groups):
                raise DataError(
                    f"{path} has row groups of more than {MAX_GROUP:,} rows or {MAX_GROUP_BYTES:,} bytes: write it "
                    "with smaller ones"
                )
            yield found
    except (ArrowException, OSError, UnicodeError) as error:
        raise DataError(f"{path} is not a readable parquet file: {' '.join(str(error).split())}") from error


def parse_json(content: bytes | str, name: str, kind: type = object, keep_surrogates: bool = False) -> Any:
    """Parses JSON in UTF-8.

    Args:
        name: of the file, for errors.
        kind: type that the content must have.
        keep_surrogates: False replaces lone surrogates, which no file and no tokenizer takes; True leaves them, as in
            the names of files that are not Unicode.

    Raises:
        DataError: it is not JSON, nested too deeply, has a number of thousands of digits, or is of another kind.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        found = json.loads(text)
        if not keep_surrogates and ("\\ud" in text or "\\uD" in text):
            found = _without_surrogates(found)
    except (ValueError, RecursionError) as error:
        reason: object = "it is nested too deeply" if isinstance(error, RecursionError) else error
        if "integer string conversion" in str(error):
            reason = "it holds a number of thousands of digits"
        raise DataError(f"{name} is not a readable JSON file: {reason}") from error
    if not isinstance(found, kind):
        what = _KINDS.get(type(found), "null")
        raise DataError(f"{name} is not what is expected there: it holds {what}, not {_KINDS[kind]}")
    return found


def is_int64(value: Any) -> bool:
    """Whether a value from JSON is a whole number that fits 64 bits, as every id and count does."""
    return type(value) is int and -(2**63) <= value < 2**63


def counts_of(value: Any) -> dict[str, int]:
    """{text: count} from JSON; raises `TypeError` if it is something else."""
    if not isinstance(value, dict) or not all(map(is_int64, value.values())):
        raise TypeError(f"expected counts, got {value!r}")
    return value


def texts_of(value: Any) -> list[str]:
    """A list of texts from JSON; raises `TypeError` if it is something else."""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"expected texts, got {value!r}")
    return value


def printable(name: str) -> str:
    """A name that any file and terminal takes: bytes that are not UTF-8, which Python reads as lone surrogates, and
    control characters become escapes such as `\\xe9`.
    """
    return _UNPRINTABLE.sub(_escaped, name)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # for a FIFO, of which nobody writes the other end


def _without_surrogates(node: Any) -> Any:
    if isinstance(node, str):
        return _SURROGATE.sub("\ufffd", node)
    if isinstance(node, list):
        return [_without_surrogates(child) for child in node]
    if isinstance(node, dict):
        return {_without_surrogates(key): _without_surrogates(child) for key, child in node.items()}
    return node


class _Expanded(BufferedIOBase):
    """Decompressed content, up to `end` bytes."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self._file, self._end = file, end

    def read(self, size: int | None = -1) -> bytes:
        left = self._end - self._file.tell()
        content = self._file.read(left + 1 if size is None or size < 0 else min(size, left + 1))
        if len(content) > left:
            self._refuse()
        return content

    def seek(self, offset: int, whence: int = 0) -> int:
        if offset > self._end:
            self._refuse()
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def _refuse(self) -> None:
        raise UnsafeError(f"decompressed it has more than {self._end:,} bytes, {MAX_EXPANSION} times its size")
