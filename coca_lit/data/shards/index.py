"""Where the samples of a shard lie, so that any of them can be read at once.

An index is found in one pass over the headers and kept beside its shard, `.00000.tar.index`, or in the cache where
that folder cannot be written. It counts for as long as size, modification time and manifest of the shard stay.
"""

import hashlib
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coca_lit.data.bad_samples import BadSample, BadSampleError, BadSamples, quiet
from coca_lit.data.prepare.parallel import parallel_map
from coca_lit.data.shards.listing import Shard
from coca_lit.data.shards.reader import IMAGE_SUFFIXES, read_fields
from coca_lit.data.shards.tar import MAX_MEMBER
from coca_lit.errors import DataError
from coca_lit.files import locked, replacing

SUFFIX, LOCK = ".index", ".lock"
VERSION = 1
PER_PROCESS = 2 * 10**9  # bytes of shards for which a further process pays
FILES = (IMAGE_SUFFIXES, ("txt",), ("json",))  # of a sample; the first of each that is there


class Stamp(NamedTuple):
    """What a shard was like when it was indexed."""

    version: int
    bytes: int
    changed_at: int  # modification time in ns
    sha256: str  # by its manifest, "" if it has none


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The N samples of a shard in tar order, complete or not."""

    shard: str
    stamp: Stamp
    keys: NDArray[np.bytes_]  # (N) in UTF-8
    places: NDArray[np.int64]  # (N, 3, 2) offset and size of image, .txt and .json, 0 where there is none
    faults: Sequence[tuple[BadSample, int]]  # what the shard as a whole lacks, and how many samples each counts for

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, i: int) -> dict[str, Any]:
        """The files of sample `i` as `read_fields` has them; `BadSampleError` if the shard is gone or has changed."""
        key = self.keys[i].decode()
        fields: dict[str, Any] = {"__key__": key}
        try:
            with open(self.shard, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if (status.st_size, status.st_mtime_ns) != (self.stamp.bytes, self.stamp.changed_at):
                    raise BadSampleError(BadSample(self.shard, key, "shard changed after it was indexed"))
                for names, (offset, size) in zip(FILES, self.places[i].tolist(), strict=True):
                    if size:
                        fields[names[0]] = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise BadSampleError(BadSample(self.shard, key, "unreadable shard", str(error))) from error
        return fields


def tar_indexes(shards: Sequence[Shard], spare: Path) -> list[TarIndex]:
    """The index of each shard; those that are not there yet are made, by one process of a machine.

    Args:
        shards: local, not compressed.
        spare: folder of this machine, for the indexes of shards whose own folder cannot be written.

    Raises:
        DataError: a shard does not fit its manifest, or an index cannot be written.
    """
    found = {shard: load_index(shard, spare) for shard in shards}
    made: dict[str, TarIndex] = {}
    if missing := [shard for shard, index in found.items() if index is None]:
        with locked(_folder(spare) / LOCK):
            found |= {shard: load_index(shard, spare) for shard in missing}
            todo = [shard for shard in missing if found[shard] is None]
            made = {index.shard: index for index in _make_all(todo, spare)}
    return [made[shard.name] if (index := found[shard]) is None else index for shard in shards]


def load_index(shard: Shard, spare: Path) -> TarIndex | None:
    """None if there is none that fits the shard as it is now."""
    try:
        with _path(shard, spare).open("rb") as file, np.load(file, allow_pickle=False) as content:
            stamp, faults = json.loads(str(content["about"]))
            keys, places = content["keys"], content["places"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # none yet, or a damaged one
    known = tuple((BadSample(*sample), count) for sample, count in faults)
    index = TarIndex(shard.name, Stamp(*stamp), keys, places, known)
    return index if index.stamp == _stamp(shard) and _sound(index) else None


def make_index(shard: Shard, spare: Path) -> TarIndex:
    """Finds and keeps the index of a shard; a shard with a manifest is compared with it."""
    bad, stamp = BadSamples(1.0), _stamp(shard)
    with quiet():
        rows = [
            (fields["__key__"].encode(errors="replace"), _places(fields))
            for fields in read_fields(shard, bad, verify=True, content=False)
        ]
    keys = np.array([key for key, _ in rows], dtype=np.bytes_)
    places = np.array([place for _, place in rows], dtype=np.int64).reshape(-1, len(FILES), 2)
    found = Counter(sample.reason for sample in bad.found)
    faults = [(sample, bad.reasons[sample.reason] // found[sample.reason]) for sample in bad.found]
    with replacing(_path(shard, spare)) as temporary, temporary.open("wb") as file:
        np.savez(file, about=np.array(json.dumps([stamp, faults])), keys=keys, places=places)
    return TarIndex(shard.name, stamp, keys, places, faults)


def _make_all(shards: Sequence[Shard], spare: Path) -> Iterator[TarIndex]:
    from rich.console import Console
    from rich.progress import track

    workers = min(os.cpu_count() or 1, 1 + sum(_stamp(shard).bytes for shard in shards) // PER_PROCESS)
    made = parallel_map(make_index, shards, spare, workers)
    yield from track(made, "indexing shards", len(shards), console=Console(stderr=True), disable=workers == 1)


def _places(fields: Mapping[str, Any]) -> list[tuple[int, int]]:
    return [next((fields[name] for name in names if name in fields), (0, 0)) for names in FILES]


def _stamp(shard: Shard) -> Stamp:
    status = os.stat(shard.name)
    return Stamp(VERSION, status.st_size, status.st_mtime_ns, shard.entry.sha256 if shard.entry else "")


def _sound(index: TarIndex) -> bool:
    """Whether all places lie in the shard: an index that came with shards may say anything."""
    if index.places.shape != (len(index.keys), len(FILES), 2) or index.places.dtype != np.int64:
        return False
    offsets, sizes = index.places[..., 0], index.places[..., 1]
    inside = (offsets >= 0) & (sizes >= 0) & (sizes <= MAX_MEMBER) & (offsets <= index.stamp.bytes - sizes)
    return index.keys.dtype.kind == "S" and bool(inside.all())


def _folder(spare: Path) -> Path:
    try:
        spare.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make {spare}: {error.strerror}; say data.cache_dir=FOLDER with another one") from error
    return spare


def _path(shard: Shard, spare: Path) -> Path:
    path = Path(shard.name).absolute()
    if os.access(path.parent, os.W_OK):
        return path.with_name(f".{path.name}{SUFFIX}")
    return spare / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}-{path.name}{SUFFIX}"
