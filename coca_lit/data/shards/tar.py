"""Tar files: a bounded reader for shards from strangers, and a writer whose output depends on the content alone.

Nothing is unpacked. Python's own reader believes the sizes that a file claims and allocates that much memory; here
every read is bounded.
"""

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, NoReturn

from webdataset.tariterators import group_by_keys
from webdataset.writer import TarWriter

from coca_lit.files import replacing

MAX_MEMBER = 128 * 2**20  # bytes; an uncompressed image of 40 million pixels
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


class UnsafeTarError(Exception):
    """The tar holds what an honest one does not; reading stops there."""


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int  # of its content, in bytes from the start of the tar
    size: int
    content: bytes  # empty unless it was asked for


def tar_members(path: Path, wanted: Callable[[str], bool] = lambda name: False) -> Iterator[Member]:
    """The regular files in tar order; the content is read only if the name is `wanted`.

    Raises:
        UnsafeTarError: a member or header of more than `MAX_MEMBER` bytes, a sparse member, or a path that leaves the
            tar.
        tarfile.ReadError: the end-of-archive marker is missing.
        OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError: the file cannot be read, or is truncated.
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
            if member.issparse():
                raise UnsafeTarError(f"the member {name!r} is sparse: a few bytes that claim to be many")
            if member.size > MAX_MEMBER:
                raise UnsafeTarError(f"the member {name!r} claims {member.size:,} bytes, more than {MAX_MEMBER:,}")
            content = tar.extractfile(member).read() if wanted(name) else b""
            yield Member(name, member.offset_data, member.size, content)
            tar.members.clear()  # it would remember every member
        # Two blocks of zeros end a tar; without them `tarfile` stops as quietly at damage as at the end.
        if reads.last + file.read(tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it ends within, or something in it is damaged")


def group_members(members: Iterable[Member], content: bool = True) -> Iterator[dict[str, Any]]:
    """{"__key__": key, suffix in lower case: content} of each run of members KEY.SUFFIX.

    Args:
        content: False gives (offset, size) in bytes in place of the content.

    Raises:
        ValueError: two members of a sample have the same suffix.
    """
    files = (
        {"fname": member.name, "data": member.content if content else (member.offset, member.size), "__url__": ""}
        for member in members
    )
    for sample in group_by_keys(files, handler=_reraise):
        sample.pop("__url__")
        yield sample


@contextmanager
def tar_writer(path: Path) -> Iterator[TarWriter]:
    """A writer of samples {"__key__": key, suffix: bytes}; the tar appears at `path` when the block ends well.

    Equal samples give equal bytes: members have no owner and the time 0, and are sorted within a sample.

    Raises:
        DataError: nothing can be written there.
    """
    with (
        replacing(path) as temporary,
        temporary.open("wb") as file,
        TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar,
    ):
        yield tar


class _BoundedReads(BufferedIOBase):
    """A file that refuses a single read of more than `MAX_MEMBER` bytes: headers can be long, too."""

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


def _reraise(error: Exception) -> NoReturn:
    error.args = error.args[:1]  # webdataset appends what it knows of the stream
    raise error
