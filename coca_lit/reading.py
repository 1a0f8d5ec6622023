"""Reading files that may come from strangers: regular files only, of bounded size, as data and never as code.

The files of a run folder, which may be a stranger's, are read by `read_run_file` and its relatives.
"""

import bz2
import codecs
import errno
import gzip
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader, BytesIO, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from coca_lit.errors import DataError, DataNotFoundError

if TYPE_CHECKING:
    import numpy as np
    from pyarrow.parquet import ParquetFile

MAX_JSON = 64 * 2**20  # bytes of a file that a program wrote: settings, scores, a manifest, a line of a journal
MAX_RUN_JSON, MAX_YAML = 16 * 2**20, 16 * 2**20  # bytes of the scores and samples of a run, and of its configuration
MAX_NPZ = 64 * 2**20  # bytes of the arrays of a run
MAX_DEPTH = 32  # lists and objects within each other in a file of a run
MAX_GROUP, MAX_GROUP_BYTES = 2**24, 2**30  # rows and bytes of the part of a Parquet file that is read at once
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open}
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}


class UnsafeError(Exception):
    """A file holds what an honest one does not; reading stops there."""


def may_pass(error: BaseException | None) -> bool:
    """Whether another attempt may succeed: the system did not read the file, and not because of what is in it, such as
    a place that no file has.
    """
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL, errno.ENAMETOOLONG, errno.ENOTDIR)


def open_regular(path: str | Path, follow: bool = True) -> BufferedReader:
    """Opens a file for reading; raises `OSError` unless it is a regular one. A FIFO would block, a device never end.

    Args:
        follow: also where the path is a symbolic link.
    """
    more = getattr(os, "O_NONBLOCK", 0)  # for a FIFO, of which nobody writes the other end
    if not follow:
        more |= getattr(os, "O_NOFOLLOW", 0)
    file = FileIO(path, opener=lambda name, flags: os.open(name, flags | more))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return BufferedReader(file)


def refuse_unlisted(error: OSError) -> None:
    """As `os.walk(onerror=…)`: a folder that cannot be listed is a `DataError`, unless only the disk may list it."""
    if Path(error.filename).name not in ("lost+found", "System Volume Information"):
        raise DataError(f"the folder '{error.filename}' cannot be listed: {error.strerror}") from error


@contextmanager
def open_data(path: Path) -> Iterator[BinaryIO]:
    """The content of a regular file, decompressed if it is named .gz, .tgz or .bz2. Raises `UnsafeError` for .xz."""
    if path.suffix == ".xz":
        raise UnsafeError("xz is not read: compress it with gzip")
    with open_regular(path) as file:
        if path.suffix not in _OPENERS:
            yield file
            return
        with _OPENERS[path.suffix](file, "rb") as content:
            yield content


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


def encoding_of(start: bytes) -> str:
    """Of a text file that begins with these bytes: UTF-16 as Windows marks it, else UTF-8, with or without a mark."""
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    """What is wrong with a text file, and what to do."""
    line = error.object.count(b"\n", 0, error.start) + 1
    return (
        f"{printable(str(path))} is not in UTF-8 (line {line}): save it as UTF-8, or turn Latin-1 into it with "
        "iconv -f WINDOWS-1252 -t UTF-8"
    )


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
    try:
        with open_regular(path) as file:
            found = ParquetFile(file, read_dictionary=list(texts) or None)
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
    """Parses JSON in UTF-8, or in UTF-16 with a mark.

    Args:
        name: of the file, for errors.
        kind: type that the content must have.
        keep_surrogates: False replaces lone surrogates, which no file and no tokenizer takes; True leaves them, as in
            the names of files that are not Unicode.

    Raises:
        DataError: it is not JSON, nested too deeply, has a number of thousands of digits, or is of another kind.
    """
    try:
        text = content.decode(encoding_of(content)) if isinstance(content, bytes) else content
        found = json.loads(text)
        if not keep_surrogates and ("\\ud" in text or "\\uD" in text):
            found = _without_surrogates(found)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not a readable JSON file: {error}") from error
    if not isinstance(found, kind):
        what = _KINDS.get(type(found), "null")
        raise DataError(f"{name} is not what is expected there: it holds {what}, not {_KINDS[kind]}")
    return found


def check_inside(path: Path, folder: Path, instead: str = "replace it by what it leads to") -> Path:
    """Where a path leads, links followed; raises `DataError` if that is out of the folder.

    Args:
        instead: what to do then.
    """
    target = Path(os.path.realpath(path))  # unlike `Path.resolve`, it takes links in a circle
    if not target.is_relative_to(os.path.realpath(folder)):
        shown = printable(str(path))
        raise DataError(f"{shown} is a link out of its folder, which is not followed: {instead}")
    return target


def read_run_file(folder: Path, name: str, limit: int) -> bytes:
    """The content of a file of a run folder.

    Args:
        name: the path within the folder, such as "samples/coco.png".
        limit: bytes.

    Raises:
        DataNotFoundError: there is no such file.
        DataError: it is no regular file, a link out of the folder, or larger.
    """
    path = folder / name
    shown = printable(str(path))
    try:
        with open_regular(check_inside(path, folder), follow=False) as file:  # nor a link that appears meanwhile
            content = file.read(limit + 1)
    except FileNotFoundError as error:
        raise DataNotFoundError(f"{shown} does not exist") from error
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror or error}") from error
    if len(content) > limit:
        raise DataError(f"{shown} holds more than {limit:,} bytes")
    return content


def read_run_json(folder: Path, name: str, kind: type = dict) -> Any:
    """A JSON file of a run folder, or an empty `kind` if there is none; raises `DataError` as `read_run_file` and
    `parse_json`, also if it is nested deeper than `MAX_DEPTH` or holds a whole number of more than 64 bits.
    """
    try:
        content = read_run_file(folder, name, MAX_RUN_JSON)
    except DataNotFoundError:
        return kind()
    shown = printable(str(folder / name))
    found = parse_json(content, shown, kind)
    _check_plain(found, shown)
    return found


def read_run_yaml(folder: Path, name: str) -> dict[str, Any]:
    """The mapping in a YAML file of a run folder, empty if there is no such file: plain values, references such as
    "${seed}" as they stand.

    Raises:
        DataError: as `read_run_file`, or it is no such YAML, or is nested deeper than `MAX_DEPTH`.
    """
    import yaml

    try:
        content = read_run_file(folder, name, MAX_YAML)
    except DataNotFoundError:
        return {}
    shown = printable(str(folder / name))
    try:
        found = yaml.load(content, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(f"{shown} is not readable YAML: {printable(' '.join(str(error).split()))}") from error
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise DataError(f"{shown} holds {_KINDS.get(type(found), 'a value')}, not a mapping")
    _check_plain(found, shown)
    return found


def read_run_npz(folder: Path, name: str) -> "dict[str, np.ndarray]":
    """The arrays in a .npz file of a run folder, by name; none if there is no such file.

    Raises:
        DataError: as `read_run_file`, or it is no such archive, or holds Python objects.
    """
    import numpy as np

    try:
        packed = read_run_file(folder, name, MAX_NPZ)
    except DataNotFoundError:
        return {}
    try:
        with np.load(BytesIO(packed), allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # a damaged archive raises many types
        raise DataError(
            f"{printable(str(folder / name))} is not a readable .npz file: {printable(str(error))}"
        ) from error


def _check_plain(node: Any, name: str, depth: int = 0) -> None:
    """Raises `DataError` unless a parsed file is made of texts, truth values, floats and whole numbers of 64 bits."""
    if depth > MAX_DEPTH:
        raise DataError(f"{name} is nested deeper than {MAX_DEPTH} levels")
    if isinstance(node, list):
        for child in node:
            _check_plain(child, name, depth + 1)
    elif isinstance(node, dict):
        for key, child in node.items():
            _check_plain(key, name, depth + 1)
            _check_plain(child, name, depth + 1)
    elif not (node is None or isinstance(node, str | bool | float) or is_int64(node)):
        raise DataError(f"{name} holds something else than texts and numbers of 64 bits: {type(node).__name__}")


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
    """A name that any file and terminal takes: bytes that are not UTF-8, which Python reads as lone surrogates, control
    characters and those that change the direction of writing become escapes such as `\\xe9`.
    """
    return _UNPRINTABLE.sub(_escaped, name)


def printable_lines(text: str) -> str:
    """As `printable`, of a text whose line breaks and tabs stay."""
    return re.sub(r"[^\n\t]+", lambda part: printable(part[0]), text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _without_surrogates(node: Any) -> Any:
    if isinstance(node, str):
        return _SURROGATE.sub("\ufffd", node)
    if isinstance(node, list):
        return [_without_surrogates(child) for child in node]
    if isinstance(node, dict):
        return {_without_surrogates(key): _without_surrogates(child) for key, child in node.items()}
    return node
