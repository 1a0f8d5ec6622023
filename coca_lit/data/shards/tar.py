"""Members of a tar that nobody vouches for, one after the other, without unpacking anything.

Python's own reader believes sizes that a file claims and asks for that much memory; here every read is bounded.
"""

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

MAX_MEMBER = 128 * 2**20  # bytes; 40 million pixels of an image that was not compressed at all
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


class UnsafeTarError(Exception):
    """The tar claims what an honest one does not; it is read no further."""


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int  # of its content, in bytes from the start of the tar
    size: int
    content: bytes


def tar_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[Member]:
    """The regular files, in tar order; unless its name is `wanted`, a file comes without its content.

    Raises:
        UnsafeTarError: a member or header of more than `MAX_MEMBER` bytes, or a name that leads out of the tar.
        tarfile.ReadError: it has no proper end.
        OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError: the file cannot be read, or breaks off.
    """
    with closing(_OPENERS.get(path.suffix, open)(path, "rb")) as file:
        reads = _BoundedReads(file)
        tar: Any = tarfile.open(fileobj=reads, mode="r:")  # noqa: SIM115  it has nothing to close but the file
        for member in tar:
            name = member.name
            if not member.isreg():
                continue
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise UnsafeTarError(f"the member {name!r} leads out of the shard")
            if member.size > MAX_MEMBER:
                raise UnsafeTarError(f"the member {name!r} claims {member.size:,} bytes, more than {MAX_MEMBER:,}")
            content = tar.extractfile(member).read() if wanted(name) else b""
            yield Member(name, member.offset_data, member.size, content)
            tar.members.clear()  # it would remember every member
        # Two blocks of zeros end a tar; without them `tarfile` stops as quietly at damage as at the end.
        if reads.last + file.read(tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it ends within, or something in it is damaged")


def split_name(member: str) -> tuple[str, str]:
    """Key of the sample and suffix, at the first dot of the file name as webdataset has it; no key if there is none."""
    folder, slash, file = member.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return (f"{folder}{slash}{stem}", suffix) if stem and dot else ("", "")


class _BoundedReads(BufferedIOBase):
    """A file that refuses to be read in one piece larger than a member may be: headers can be long, too."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.last = b""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_MEMBER:
            raise UnsafeTarError(f"a header claims {size:,} bytes, more than {MAX_MEMBER:,}")
        self.last = self._file.read(size)
        return self.last

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
