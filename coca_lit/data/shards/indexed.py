"""Shards as a map-style data set: shuffling over all samples at once, and access to any batch.

An index holds where the samples of a shard lie. It is made in one pass over the headers and kept beside its shard as
`.00000.tar.index`, or in the cache where that folder cannot be written, and is valid as long as size, modification
time and manifest entry of the shard stay the same. That of a remote shard is kept in the cache, and valid as long as
the store lists the same version. It is fetched if it lies beside the shard and belongs to what the manifest records.

The order depends on the seed alone, not on the number of ranks and workers. The samples are read in passes, each in
its own order; epochs are cut from the passes one after the other, whatever their length.
"""

import hashlib
import json
import os
import random
import time
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import Sampler

from coca_lit.data.bad_samples import BadSample, BadSampleError, BadSamples, LostShardError, quiet
from coca_lit.data.batch import Example
from coca_lit.data.examples import TrainingExamples
from coca_lit.data.loader import Schedule, epoch_order, per_rank
from coca_lit.data.shards.cache import ChangedError
from coca_lit.data.shards.listing import REQUESTS, Shard, index_name
from coca_lit.data.shards.mixture import Source, counts_after, weighted_round_robin
from coca_lit.data.shards.reader import IMAGE_SUFFIXES, Preprocess, read_fields, read_limit, sample_of
from coca_lit.data.shards.store import RangeFile, ask, read_range
from coca_lit.data.shards.tar import MAX_MEMBER
from coca_lit.errors import DataError
from coca_lit.files import atomic_write, replacing
from coca_lit.reading import open_regular, parse_json, printable

SUFFIX, LOCK = ".index", ".lock"
CHANGED = "shard changed after it was indexed"
VERSION = 2
PER_PROCESS = 2 * 10**9  # bytes of local shards for which a further process pays
FILES = (IMAGE_SUFFIXES, ("txt",), ("json",))  # of a sample; the first of each that is there


class Stamp(NamedTuple):
    """The state of a shard when it was indexed."""

    version: int
    bytes: int
    changed_at: int  # modification time in ns, 0 of a remote one
    content: str  # sha256 from its manifest, else the version of a remote one, else ""


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The N samples of a shard in tar order, complete or not."""

    shard: str
    stamp: Stamp
    keys: NDArray[np.uint8]  # all of them in UTF-8, one after the other: one long key must not make every other long
    key_ends: NDArray[np.int64]  # (N) in `keys`
    places: NDArray[np.int64]  # (N, 3, 2) offset and size of image, .txt and .json, 0 where there is none
    faults: Sequence[BadSample]  # found while reading the headers; without a key: of the shard as a whole
    remote: Shard | None = None  # where a shard comes from that is not local

    def __len__(self) -> int:
        return len(self.places)

    @property
    def is_torn(self) -> bool:
        """Whether samples of the shard are lost, or it has none."""
        return any(not fault.key for fault in self.faults)

    def key(self, i: int) -> str:
        return self.keys[self.key_ends[i - 1] if i else 0 : self.key_ends[i]].tobytes().decode()

    def keep(self, keys: Collection[str]) -> "TarIndex":
        """The samples with these keys alone; raises `DataError` if the shard is whole and lacks some of them."""
        names = [self.key(i) for i in range(len(self))]
        rows = [i for i, name in enumerate(names) if name in keys]
        faults = [fault for fault in self.faults if not fault.key or fault.key in keys]
        lost = set(keys).difference(names, (fault.key for fault in faults))
        if lost and not self.is_torn:
            raise DataError(
                f"{self.shard} lacks {len(lost)} samples of the selection, e.g. {printable(min(lost))}: choose again, "
                "by scores of the shard as it is now"
            )
        kept = [names[i].encode() for i in rows]
        ends = np.cumsum([len(key) for key in kept], dtype=np.int64)
        packed = np.frombuffer(b"".join(kept), dtype=np.uint8)
        return replace(self, keys=packed, key_ends=ends, places=self.places[rows], faults=faults)

    def read(self, i: int) -> dict[str, Any]:
        """The members of sample `i` as in `read_fields`; `LostShardError` if the shard is gone or has changed."""
        key = self.key(i)
        fields: dict[str, Any] = {"__key__": key}
        try:
            with self._open() as file:
                status = os.fstat(file.fileno())
                changed_at = 0 if self.remote else status.st_mtime_ns
                if (status.st_size, changed_at) != (self.stamp.bytes, self.stamp.changed_at):
                    raise ChangedError
                for names, (offset, size) in zip(FILES, self.places[i].tolist(), strict=True):
                    if size:
                        file.seek(offset)
                        fields[names[0]] = file.read(min(size, read_limit(f".{names[0]}")))
        except ChangedError as error:
            raise LostShardError(BadSample(self.shard, key, CHANGED)) from error
        except OSError as error:
            raise LostShardError(BadSample(self.shard, key, "unreadable shard", str(error))) from error
        return fields

    def _open(self) -> BinaryIO:
        """The local copy of a remote shard is fetched if it is not there."""
        if not (self.remote and self.remote.cache):
            return open_regular(self.shard)
        try:
            return open_regular(self.remote.cache.path(self.remote.name, self.remote.stored))
        except FileNotFoundError:
            with self.remote.local(verify=True) as path:
                return open_regular(path)


def tar_indexes(shards: Sequence[Shard], fallback_dir: Path) -> list[TarIndex]:
    """The index of each shard, of its selected samples if there is a selection; missing ones are made, by one process
    of a machine.

    Args:
        shards: not compressed.
        fallback_dir: folder of this machine, for the indexes of remote shards and of those whose own folder cannot be
            written.

    Raises:
        DataError: a shard does not match its manifest, or an index cannot be written.
        StoreError: the store of a remote shard does not answer.
    """
    whole = [shard._replace(selection=None) for shard in shards]
    found = {shard: load_index(shard, fallback_dir) for shard in whole}
    made: dict[str, TarIndex] = {}
    if missing := [shard for shard, index in found.items() if index is None]:
        try:
            fallback_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"cannot make {fallback_dir}: {error.strerror}; set data.cache_dir to a folder that can be written"
            ) from error
        with FileLock(fallback_dir / LOCK):
            found |= {shard: load_index(shard, fallback_dir) for shard in missing}
            todo = [shard for shard in missing if found[shard] is None]
            made = {index.shard: index for index in _make_all(todo, fallback_dir)}
    indexes = [made[shard.name] if (index := found[shard]) is None else index for shard in whole]
    return [
        index.keep(shard.selection.keys(shard.file_name)) if shard.selection else index
        for shard, index in zip(shards, indexes, strict=True)
    ]


class IndexedShards(TrainingExamples):
    """The samples of all sources, one after the other, indexed by (pass, i)."""

    max_tries = 100  # at the 5 % of bad samples that are usual on the web, even ten in a row occur

    def __init__(
        self, sources: Sequence[Source[TarIndex]], preprocess: Preprocess, max_bad_fraction: float, near: bool = False
    ) -> None:
        """With `near` a sample is replaced by one of its shard, or of the next one if that is lost."""
        super().__init__(preprocess.seed, max_bad_fraction)
        self.preprocess, self.near = preprocess, near
        self.indexes = [index for source in sources for index in source.shards]
        self.names = [source.name for source in sources]
        self.shard_ends = [*accumulate(map(len, self.indexes))]
        self.source_ends = [*accumulate(map(count_samples, sources))]
        self._lost: dict[int, LostShardError] = {}  # remote shards, for which the store need not be asked again
        self.bad.found += [fault for index in self.indexes for fault in index.faults]  # for the first example

    def __len__(self) -> int:
        return self.shard_ends[-1]

    def example(self, epoch: int, i: int, *patches: int) -> Example:
        shard = bisect_right(self.shard_ends, i)
        index = self.indexes[shard]
        row = i - self.shard_ends[shard] + len(index)
        if shard in self._lost:
            raise LostShardError(self._lost[shard].sample._replace(key=index.key(row)))
        try:
            fields = index.read(row)
        except LostShardError as error:
            if index.remote:
                self._lost[shard] = error
            raise
        sample = sample_of(fields, self.preprocess.caption_keys, index.shard)
        return self.preprocess(sample, self.names[bisect_right(self.source_ends, i)], epoch, patches=patches)

    def replacement(self, i: int, rng: random.Random, error: BadSampleError) -> int:
        """A sample of the same source."""
        source = bisect_right(self.source_ends, i)
        start, end = self.source_ends[source - 1] if source else 0, self.source_ends[source]
        if self.near:
            shard = bisect_right(self.shard_ends, i)
            if isinstance(error, LostShardError):
                after = self.shard_ends[shard]
                shard = bisect_right(self.shard_ends, after if after < end else start)
            start, end = self.shard_ends[shard] - len(self.indexes[shard]), self.shard_ends[shard]
        return rng.randrange(start, end)


@dataclass(eq=False)
class IndexedBatches(Sampler[list[tuple[int, ...]]]):
    """A rank's batches of (pass, i), from global batch `start` to `stop` of a schedule, counted over all epochs."""

    sources: Sequence[Source[TarIndex]]
    schedule: Schedule
    seed: int
    start: int
    stop: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        per_rank(self.schedule.batch_size, self.world)
        self.weights = [source.weight for source in self.sources]
        self.counts = [count_samples(source) for source in self.sources]  # a sum over all shards
        self.starts = [0, *accumulate(self.counts)]  # of each source, in samples
        self._orders: dict[int, tuple[int, Tensor]] = {}  # of each source: its current pass and the order of that

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        for number in range(self.start, self.stop):
            yield self._part(number, self.rank, self.world)

    def global_batch(self, number: int) -> list[tuple[int, ...]]:
        """The same for any number of ranks; computed without the batches before it."""
        return self._part(number, 0, 1)

    def _part(self, number: int, rank: int, world: int) -> list[tuple[int, ...]]:
        """The samples of a rank in a global batch."""
        first, size, patches = self.schedule.at(number)
        order = weighted_round_robin(self.weights, counts_after(first, self.weights))
        return [(*self._sample(source, k), *patches) for source, k in islice(order, rank, size, world)]

    def _sample(self, source: int, k: int) -> tuple[int, int]:
        """(pass, i) of the `k`-th sample of a source, from 0."""
        epoch, place = divmod(k, self._per_pass(source))
        return epoch, self.starts[source] + int(self._order(source, epoch)[place])

    def _per_pass(self, source: int) -> int:
        """All samples; with a single source only whole batches of them, as with records."""
        count, batch_size = self.counts[source], self.schedule.batch_size
        return count - count % batch_size if len(self.sources) == 1 and count >= batch_size else count

    def _order(self, source: int, epoch: int) -> Tensor:
        if self._orders.get(source, (None,))[0] != epoch:
            name = [self.sources[source].name] if self.sources[source].name else []
            self._orders[source] = epoch, epoch_order(self.counts[source], self.seed, epoch, *name)
        return self._orders[source][1]


def load_index(shard: Shard, fallback_dir: Path) -> TarIndex | None:
    """None if no index matches the shard as it is now. The file may come from a stranger, who can put anything into it:
    what is not an index of this shard in every detail counts as none.
    """
    index = _load(shard, _path(shard, fallback_dir))
    return index if index and index.stamp == _stamp(shard) else None


def make_index(shard: Shard, fallback_dir: Path, file: RangeFile | None = None) -> TarIndex:
    """Makes and stores the index of a shard, which is compared with its manifest if it has one.

    Args:
        file: a remote shard of which only the headers are read.
    """
    bad, stamp = BadSamples(1.0), _stamp(shard)
    with quiet():
        rows = [
            (fields["__key__"].encode(), _places(fields))
            for fields in read_fields(shard, bad, verify=True, content=False, file=cast(BinaryIO, file))
        ]
    keys = np.frombuffer(b"".join(key for key, _ in rows), dtype=np.uint8)
    key_ends = np.cumsum([len(key) for key, _ in rows], dtype=np.int64)
    places = np.array([place for _, place in rows], dtype=np.int64).reshape(-1, len(FILES), 2)
    index = TarIndex(shard.name, stamp, keys, key_ends, places, bad.found, shard if shard.cache else None)
    _save(index, _path(shard, fallback_dir))
    return index


def _make_all(shards: Sequence[Shard], fallback_dir: Path) -> Iterator[TarIndex]:
    from rich.console import Console
    from rich.progress import track

    local = [shard for shard in shards if not shard.cache]
    remote = [shard for shard in shards if shard.cache]
    size = sum(_stamp(shard).bytes for shard in shards)
    with ThreadPoolExecutor(REQUESTS) as pool:
        fetched = pool.map(partial(_remote_index, fallback_dir=fallback_dir, whole=_fit_together(remote)), remote)
        made = chain(_local_indexes(local, fallback_dir), fetched)
        console = Console(stderr=True)
        yield from track(made, "indexing shards", len(shards), console=console, disable=size < PER_PROCESS)


def _local_indexes(shards: Sequence[Shard], fallback_dir: Path) -> Iterator[TarIndex]:
    """Made in several processes if the shards are large, in the order in which they are ready."""
    workers = min(os.cpu_count() or 1, len(shards), 1 + sum(_stamp(shard).bytes for shard in shards) // PER_PROCESS)
    if workers < 2:
        yield from (make_index(shard, fallback_dir) for shard in shards)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for made in as_completed([pool.submit(make_index, shard, fallback_dir) for shard in shards]):
            yield made.result()


def _fit_together(remote: Sequence[Shard]) -> bool:
    """Whether the cache has room for all shards: then they are fetched now rather than in the first pass."""
    sizes = sum(shard.stored.bytes for shard in remote if shard.stored)
    return all(shard.cache and sizes <= shard.cache.max_bytes for shard in remote)


def _remote_index(shard: Shard, fallback_dir: Path, whole: bool) -> TarIndex:
    """The index that lies beside the shard. If there is none it is made: from the `whole` shard, which the cache then
    keeps, or from its headers alone.
    """
    assert shard.cache
    assert shard.stored
    if index := _shipped_index(shard, fallback_dir):
        return index
    if whole:
        return make_index(shard, fallback_dir)
    began, file = time.time(), RangeFile(shard.name, shard.stored.bytes, shard.cache.patience)
    index = make_index(shard, fallback_dir, file)
    shard.cache.record(shard.name, file.fetched, began)
    return index


def _shipped_index(shard: Shard, fallback_dir: Path) -> TarIndex | None:
    """The index that lies beside the shard; None if there is none, or it is not that of the shard in the manifest."""
    assert shard.cache
    if not shard.entry or not shard.index_file or shard.index_file.bytes > shard.entry.bytes:
        return None
    folder, _, name = shard.name.rpartition("/")
    url, size, began = f"{folder}/{index_name(name)}", shard.index_file.bytes, time.time()
    try:
        content = ask(url, shard.cache.patience, lambda store: read_range(store, url, 0, size))
    except FileNotFoundError:
        return None
    shard.cache.record(url, len(content), began)
    path = _path(shard, fallback_dir)
    atomic_write(path, content)
    index = _load(shard, path)
    if not index or index.stamp._replace(changed_at=0) != _stamp(shard):
        return None
    faults = [fault._replace(shard=shard.name) for fault in index.faults]  # named as where it was made
    index = replace(index, stamp=_stamp(shard), faults=faults)
    _save(index, path)
    return index


def _load(shard: Shard, path: Path) -> TarIndex | None:
    """A sound index of a shard of the size that it names; None if the file is none."""
    if not path.is_file():  # also a FIFO, which would block
        return None
    try:
        with safe_open(path, framework="np") as file:
            keys, key_ends, places = (file.get_tensor(name) for name in ("keys", "key_ends", "places"))
            stamp, faults = parse_json((file.metadata() or {})["about"], str(path), list)
        found = [BadSample(*fault) for fault in faults]
        remote = shard if shard.cache else None
        index = TarIndex(shard.name, Stamp(*stamp), keys, key_ends, places, found, remote)
        return index if _sound(index) else None
    except Exception:  # there is none yet, or it is damaged, or forged
        return None


def _save(index: TarIndex, path: Path) -> None:
    about = json.dumps([index.stamp, index.faults])
    with replacing(path) as temporary:
        tensors: dict[str, NDArray[Any]] = {"keys": index.keys, "key_ends": index.key_ends, "places": index.places}
        save_file(tensors, temporary, {"about": about})


def count_samples(source: Source[TarIndex]) -> int:
    return sum(map(len, source.shards))


def _places(fields: Mapping[str, Any]) -> list[tuple[int, int]]:
    return [next((fields[name] for name in names if name in fields), (0, 0)) for names in FILES]


def _stamp(shard: Shard) -> Stamp:
    sha256 = shard.entry.sha256 if shard.entry else ""
    if shard.stored:
        return Stamp(VERSION, shard.stored.bytes, 0, sha256 or shard.stored.version)
    status = os.stat(shard.name)
    return Stamp(VERSION, status.st_size, status.st_mtime_ns, sha256)


def _sound(index: TarIndex) -> bool:
    """Whether all keys and places lie where they can."""
    names, ends, places = index.keys, index.key_ends, index.places
    if (names.dtype, ends.dtype, places.dtype) != (np.uint8, np.int64, np.int64) or names.ndim != 1:
        return False
    if ends.ndim != 1 or places.shape != (len(ends), len(FILES), 2):
        return False
    text = names.tobytes().decode()
    starts = np.concatenate([[0], ends[:-1]])[: len(ends)]
    if not (starts <= ends).all() or len(names) != (ends[-1] if len(ends) else 0):
        return False
    within_a_letter = (names[starts[starts < ends]] & 0xC0) == 0x80
    offsets, sizes = places[..., 0], places[..., 1]
    inside = (offsets >= 0) & (sizes >= 0) & (sizes <= MAX_MEMBER) & (offsets <= index.stamp.bytes - sizes)
    said = "".join(part for fault in index.faults for part in fault)
    return bool(inside.all()) and not within_a_letter.any() and printable(text + said) == text + said


def _path(shard: Shard, fallback_dir: Path) -> Path:
    path = Path(shard.name).absolute()
    if not shard.cache and os.access(path.parent, os.W_OK):
        return path.with_name(index_name(path.name))
    key = os.fsencode(shard.name if shard.cache else path)
    return fallback_dir / f"{hashlib.sha256(key).hexdigest()[:16]}-{path.name}{SUFFIX}"
