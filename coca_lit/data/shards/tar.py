"""Tar files: a bounded reader for shards from strangers, and a writer whose output depends on the content alone.

Nothing is unpacked. Python's own reader believes the sizes that a file claims and allocates that much memory; here it
reads headers alone, and every read is bounded.
"""

import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from webdataset.writer import TarWriter

from coca_lit.files import replacing
from coca_lit.reading import UnsafeError, open_data, printable

MAX_MEMBER = 128 * 2**20  # bytes that a member may claim
MAX_HEADER = 16 * 2**10  # bytes that a header may claim; the longest name has 4 kB
TWICE = "__twice__"  # field of a sample of which two members have the same name


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str  # made printable
    offset: int  # of its content, in bytes from the start of the tar
    size: int
    content: bytes  # as much of it as was asked for


def tar_members(
    path: Path | BinaryIO, limit: Callable[[str], int] = lambda name: 0, outside: list[str] | None = None
) -> Iterator[Member]:
    """The regular files in tar order.

    Args:
        path: or an open file that is not compressed.
        limit: name -> how many bytes of the content are read, at most.
        outside: gets the names of members whose path leaves the tar, which are left out then; None refuses them.

    Raises:
        UnsafeError: a member of more than `MAX_MEMBER` bytes, a header of more than `MAX_HEADER`, a sparse member, a
            path that leaves the tar, or a bomb, see `open_data`.
        tarfile.ReadError: the end-of-archive marker is missing.
        OSError, EOFError, tarfile.TarError, zlib.error: the file cannot be read, or is truncated. Other errors of
            Python's reader, such as `ValueError`, are possible.
    """
    with open_data(path) if isinstance(path, Path) else nullcontext(path) as file:
        headers = _Headers(file)
        tar: Any = tarfile.TarFile(fileobj=headers)  # it has nothing to close but the file
        for member in tar:
            name = printable(member.name)
            if not 0 <= member.size <= MAX_MEMBER:
                raise UnsafeError(f"the member {name!r} claims {member.size:,} bytes, not 0 to {MAX_MEMBER:,}")
            tar.members.clear()  # it would remember every member
            if not member.isreg():
                continue
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                if outside is None:
                    raise UnsafeError(f"the member {name!r} leads out of the shard")
                outside.append(name)
                continue
            if member.issparse():
                raise UnsafeError(f"the member {name!r} is sparse: a few bytes that claim to be many")
            content = b""
            wanted = min(member.size, limit(name))
            if wanted:
                file.seek(member.offset_data)
                content = file.read(wanted)
            yield Member(name, member.offset_data, member.size, content)
            if len(content) < wanted:  # not before: its name shows that the sample before it is complete
                raise tarfile.ReadError("unexpected end of data")
        # Two blocks of zeros end a tar; without them `tarfile` stops as quietly at damage as at the end.
        if headers.last + file.read(tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it ends within, or something in it is damaged")


def group_members(members: Iterable[Member], content: bool = True) -> Iterator[dict[str, Any]]:
    """{"__key__": key, suffix in lower case: content} of each run of members KEY.SUFFIX, split as webdataset does, but
    in linear time and without hidden files. If two members of a sample have the same name, `TWICE` gives it.

    Args:
        content: False gives (offset, size) in bytes in place of the content.
    """
    sample: dict[str, Any] = {}
    for member in members:
        stem, dot, suffix = member.name.rpartition("/")[2].partition(".")
        if not stem or not dot:
            continue
        key = member.name.removesuffix(f".{suffix}")
        if sample.get("__key__") != key:
            if sample:
                yield sample
            sample = {"__key__": key}
        suffix = suffix.lower()
        if suffix in sample:
            sample[TWICE] = member.name
        else:
            sample[suffix] = member.content if content else (member.offset, member.size)
    if sample:
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


class _Headers(BufferedIOBase):
    """What `tarfile` sees of a tar: headers of at most `MAX_HEADER` bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.last = b""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise UnsafeError(f"a header claims {size:,} bytes, more than {MAX_HEADER:,}")
        self.last = self._file.read(size)
        return self.last

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
