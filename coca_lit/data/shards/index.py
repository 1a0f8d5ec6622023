"""The index of a shard, which says where its samples lie: made, stored and found.

It is made in one pass over the headers and kept beside its shard as `.00000.tar.index`, or in the cache where that
folder cannot be written, and is valid as long as size, modification time and manifest entry of the shard stay the
same. That of a remote shard is kept in the cache, and valid as long as the store lists the same version. It is fetched
if it lies beside the shard and belongs to what the manifest records.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from coca_lit.data.bad_samples import BadSample, BadSamples, LostShardError
from coca_lit.data.inputs import IMAGES
from coca_lit.data.shards.listing import REQUESTS
from coca_lit.data.shards.sample import member_kinds, read_limit, suffix_of
from coca_lit.data.shards.scan import read_fields
from coca_lit.data.shards.shard import ChangedError, Shard, Stamp, index_name, locked_cache
from coca_lit.errors import DataError
from coca_lit.files import atomic_write, replacing
from coca_lit.machine import processors
from coca_lit.reading import parse_json, printable

if TYPE_CHECKING:
    from coca_lit.data.shards.remote.shards import RemoteShard

PER_PROCESS = 2 * 10**9  # bytes of local shards for which a further process pays


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The N samples of a shard in tar order, complete or not."""

    shard: Shard
    stamp: Stamp
    keys: NDArray[np.uint8]  # all of them in UTF-8, one after the other: one long key must not make every other long
    key_ends: NDArray[np.int64]  # (N) in `keys`
    places: NDArray[np.int64]  # (N, K, 2) offset and size of each of `member_kinds`, 0 where there is none
    faults: Sequence[BadSample]  # found while reading the headers; without a key: of the shard as a whole

    def __len__(self) -> int:
        return len(self.places)

    @property
    def is_torn(self) -> bool:
        """Whether samples of the shard are lost, or it has none."""
        return any(not fault.key for fault in self.faults)

    def key(self, i: int) -> str:
        start = self.key_ends[i - 1] if i else 0
        return self.keys[start : self.key_ends[i]].tobytes().decode(errors="replace")

    def read(self, i: int, suffixes: Sequence[str] = IMAGES.suffixes) -> dict[str, Any]:
        """The texts and the image of sample `i` as in `read_fields`; `LostShardError` if the shard is gone or
        has changed.
        """
        key = self.key(i)
        fields: dict[str, Any] = {"__key__": key}
        try:
            with self.shard.open(self.stamp) as file:
                for names, (offset, size) in zip(member_kinds(), self.places[i].tolist(), strict=True):
                    if size and names[0] in ("txt", "json", *suffixes):
                        file.seek(offset)
                        fields[names[0]] = file.read(min(size, read_limit(f".{names[0]}")))
        except ChangedError as error:
            raise LostShardError(BadSample(self.shard.name, key, "shard changed after it was indexed")) from error
        except OSError as error:
            raise LostShardError(BadSample(self.shard.name, key, "unreadable shard", str(error))) from error
        return fields


def tar_indexes(shards: Sequence[Shard], fallback_dir: Path) -> list[TarIndex]:
    """The index of each shard, of its selected samples if there is a selection; missing ones are made, by one process
    of a machine.

    Args:
        shards: not compressed.
        fallback_dir: folder of this machine, for the indexes of remote shards and of those whose own folder cannot be
            written.

    Raises:
        DataError: a shard does not match its manifest or cannot be read, or an index cannot be written.
        StoreError: the store of a remote shard does not answer.
    """
    unselected = [replace(shard, selection=None) for shard in shards]
    loaded = {shard: load_index(shard, fallback_dir) for shard in dict.fromkeys(unselected)}
    found = {shard: index for shard, index in loaded.items() if index is not None}
    missing = [shard for shard in loaded if shard not in found]
    if missing:
        from rich.console import Console
        from rich.progress import track

        with locked_cache(fallback_dir, ".lock"):
            again = ((shard, load_index(shard, fallback_dir)) for shard in missing)
            found |= {shard: index for shard, index in again if index is not None}
            todo = [shard for shard in missing if shard not in found]
            size = sum(shard.stamp().bytes for shard in todo)
            new = _local_indexes([shard for shard in todo if not shard.is_remote], fallback_dir)
            remote = [cast("RemoteShard", shard) for shard in todo if shard.is_remote]
            if remote:
                new = chain(new, _remote_indexes(remote, fallback_dir))
            shown = track(new, "indexing shards", len(todo), console=Console(stderr=True), disable=size < PER_PROCESS)
            found |= {index.shard: index for index in shown}
    return [
        keep(found[name], shard.selection.keys(shard.file_name)) if shard.selection else found[name]
        for name, shard in zip(unselected, shards, strict=True)
    ]


def count_faults(shards: Sequence[Shard], indexes: Sequence[TarIndex], bad: BadSamples) -> None:
    """Counts the samples of the shards, and the faults that were found when they were indexed."""
    pairs = list(zip(shards, indexes, strict=True))
    bad.seen += sum(map(len, indexes))
    for shard, index in sorted(pairs, key=lambda pair: pair[1].is_torn):  # whole ones tell how many samples one has
        if not index.is_torn:
            bad.end_of_shard(len(index))
        for fault in index.faults:
            if fault.key:
                bad.seen += 1
                bad.add(fault.reason, fault.shard, fault.key, fault.detail)
            else:
                bad.lose(fault.reason, fault.shard, shard.samples, len(index), fault.detail)


def keep(index: TarIndex, keys: Collection[str]) -> TarIndex:
    """The samples with these keys alone; raises `DataError` if the shard is whole and lacks some of them."""
    names = [index.key(i) for i in range(len(index))]
    rows = [i for i, name in enumerate(names) if name in keys]
    faults = [fault for fault in index.faults if not fault.key or fault.key in keys]
    lost = set(keys).difference(names, (fault.key for fault in faults))
    if lost and not index.is_torn:
        example = printable(min(lost))
        raise DataError(f"{index.shard} lacks {len(lost)} samples of the selection, e.g. {example}: choose again")
    kept = [names[i].encode() for i in rows]
    ends = np.cumsum([len(key) for key in kept], dtype=np.int64)
    packed = np.frombuffer(b"".join(kept), dtype=np.uint8)
    return replace(index, keys=packed, key_ends=ends, places=index.places[rows], faults=faults)


def load_index(shard: Shard, fallback_dir: Path) -> TarIndex | None:
    """None if no index matches the shard as it is now. The file may come from a stranger, who can put anything into it:
    what is not an index of this shard in every detail counts as none.
    """
    index = read_index(shard, index_path(shard, fallback_dir))
    known = [shard.stamp()] + ([cast("RemoteShard", shard).stamp_of_headers()] if shard.is_remote else [])
    return index if index is not None and index.stamp in known else None


def make_index(shard: Shard, fallback_dir: Path, file: BinaryIO | None = None) -> TarIndex:
    """Makes and stores the index of a shard, which is compared with its manifest if it has one.

    Args:
        file: a remote shard of which only the headers are read.
    """
    bad = BadSamples(1.0, quiet=True)
    stamp = shard.stamp() if file is None else cast("RemoteShard", shard).stamp_of_headers()
    rows = [
        (fields["__key__"].encode(), _places_of(fields))
        for fields in read_fields(shard, bad, verify=True, content=False, file=file)
    ]
    keys = np.frombuffer(b"".join(key for key, _ in rows), dtype=np.uint8)
    key_ends = np.cumsum([len(key) for key, _ in rows], dtype=np.int64)
    places = np.array([place for _, place in rows], dtype=np.int64).reshape(-1, len(member_kinds()), 2)
    index = TarIndex(shard, stamp, keys, key_ends, places, bad.found)
    write_index(index, index_path(shard, fallback_dir))
    return index


def _places_of(fields: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Offset and size of each kind of member of a sample, 0 where there is none."""
    places: list[tuple[int, int]] = []
    for suffixes in member_kinds():
        suffix = suffix_of(fields, suffixes)
        places.append(fields[suffix] if suffix else (0, 0))
    return places


def _local_indexes(shards: Sequence[Shard], fallback_dir: Path) -> Iterator[TarIndex]:
    """Made in several processes if the shards are large, in the order in which they are ready."""
    workers = min(processors(), len(shards), 1 + sum(shard.stamp().bytes for shard in shards) // PER_PROCESS)
    if workers < 2:
        yield from (make_index(shard, fallback_dir) for shard in shards)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for made in as_completed([pool.submit(make_index, shard, fallback_dir) for shard in shards]):
            yield made.result()


def _remote_indexes(shards: Sequence["RemoteShard"], fallback_dir: Path) -> Iterator[TarIndex]:
    """In the order of the shards. An index that lies beside its shard is fetched. If there is none it is made: from the
    whole shard if the cache has room for all of them, so that they are fetched now rather than in the first pass, else
    from the headers alone.
    """
    all_fit = sum(shard.stored.bytes for shard in shards) <= shards[0].cache.max_bytes

    def index_of(shard: "RemoteShard") -> TarIndex:
        index = _shipped_index(shard, fallback_dir)
        if index:
            return index
        with nullcontext() if all_fit else shard.headers() as file:
            return make_index(shard, fallback_dir, file)

    with ThreadPoolExecutor(REQUESTS) as pool:
        yield from pool.map(index_of, shards)


def _shipped_index(shard: "RemoteShard", fallback_dir: Path) -> TarIndex | None:
    """The index that lies beside the shard; None if there is none, or it is not that of the shard in the manifest."""
    content = shard.shipped_index()
    if content is None:
        return None
    path = index_path(shard, fallback_dir)
    atomic_write(path, content)
    index = read_index(shard, path)
    if not index or index.stamp._replace(changed_at=0) != shard.stamp():
        return None
    faults = [fault._replace(shard=shard.name) for fault in index.faults]  # named as where it was made
    index = replace(index, stamp=shard.stamp(), faults=faults)
    write_index(index, path)
    return index


def read_index(shard: Shard, path: Path) -> TarIndex | None:
    """A sound index of a shard of the size that it names; None if the file is none."""
    if not path.is_file():  # also a FIFO, which would block
        return None
    try:
        with safe_open(path, framework="np") as file:
            keys, key_ends, places = (file.get_tensor(name) for name in ("keys", "key_ends", "places"))
            stamp, faults, suffixes = parse_json((file.metadata() or {})["about"], str(path), list)
        if suffixes != [list(names) for names in member_kinds()]:  # other kinds of input are declared than there were
            return None
        found = [BadSample(*fault) for fault in faults]
        index = TarIndex(shard, Stamp(*stamp), keys, key_ends, places, found)
        return index if _sound(index) else None
    except Exception:  # there is none yet, or it is damaged, or forged
        return None


def write_index(index: TarIndex, path: Path) -> None:
    about = json.dumps([index.stamp, index.faults, member_kinds()])
    with replacing(path) as temporary:
        tensors: dict[str, NDArray[Any]] = {"keys": index.keys, "key_ends": index.key_ends, "places": index.places}
        save_file(tensors, temporary, {"about": about})


def _sound(index: TarIndex) -> bool:
    """Whether all samples lie within the shard, and their names change no terminal."""
    arrays = (index.keys, index.key_ends, index.places)
    shape = (len(index.key_ends), len(member_kinds()), 2)
    if tuple(array.dtype for array in arrays) != (np.uint8, np.int64, np.int64) or index.places.shape != shape:
        return False
    offsets = index.places[..., 0]
    sizes = index.places[..., 1]
    inside = (offsets >= 0) & (sizes >= 0) & (offsets <= index.stamp.bytes - sizes)
    text = index.keys.tobytes().decode()
    text += "".join(part for fault in index.faults for part in fault)
    return bool(inside.all()) and printable(text) == text


def index_path(shard: Shard, fallback_dir: Path) -> Path:
    path = Path(shard.name).absolute()
    if not shard.is_remote and os.access(path.parent, os.W_OK):
        return path.with_name(index_name(path.name))
    key = os.fsencode(shard.name if shard.is_remote else path)
    return fallback_dir / f"{hashlib.sha256(key).hexdigest()[:16]}-{path.name}.index"
