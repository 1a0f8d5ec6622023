"""Shards on object stores and web servers: their folders, what is fetched of them, and what is fetched ahead."""

import fnmatch
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import BinaryIO, ClassVar, cast

from coca_lit.data.shards.remote.cache import CacheFullError, ShardCache
from coca_lit.data.shards.remote.store import RangeFile, Stored, StoreError, list_folder, look_up, read_file
from coca_lit.data.shards.shard import (
    INDEX_VERSION,
    MANIFEST,
    CacheSettings,
    ChangedError,
    Manifest,
    ManifestEntry,
    Shard,
    Stamp,
    check_digest,
    index_name,
    parse_manifest,
    split,
)
from coca_lit.errors import DataError
from coca_lit.reading import MAX_JSON, open_regular

THREADS = 4  # of a process that fetch shards
PAUSE = 5.0  # seconds until a shard that could not be fetched ahead is tried again


@dataclass(frozen=True, kw_only=True)
class RemoteShard(Shard):
    """A shard that is read through a cache of local copies."""

    stored: Stored  # as its store listed it
    cache: ShardCache
    index_file: Stored | None = None  # beside the shard, if there is a manifest to compare it with
    is_remote: ClassVar[bool] = True

    def stamp(self) -> Stamp:
        return Stamp(INDEX_VERSION, self.stored.bytes, 0, self.entry.sha256 if self.entry else self.stored.version)

    def stamp_of_headers(self) -> Stamp:
        """Of an index made of the headers alone: it is of this version, since nobody has compared the digest."""
        return self.stamp()._replace(content=f"{self.stamp().content} {self.stored.version}")

    def open(self, stamp: Stamp) -> BinaryIO:
        """The local copy, which is fetched if it is not there."""
        try:
            file = open_regular(self.cache.path(self.name, self.stored))
        except FileNotFoundError:
            with self.local(verify=True) as path:
                file = open_regular(path)
        if os.fstat(file.fileno()).st_size != stamp.bytes:
            file.close()
            raise ChangedError
        return file

    @contextmanager
    def headers(self) -> Iterator[BinaryIO]:
        """The shard as a file of which only what is read is fetched."""
        began = time.time()
        file = RangeFile(self.name, self.stored.bytes, self.cache.patience)
        yield cast(BinaryIO, file)
        self.cache.record(self.name, file.fetched, began)

    def shipped_index(self) -> bytes | None:
        """The file of an index that lies beside the shard, if there is one and a manifest to compare it with."""
        if not self.entry or not self.index_file or self.index_file.bytes > self.entry.bytes:
            return None
        folder, name = split(self.name)
        url = f"{folder}/{index_name(name)}"
        began = time.time()
        try:
            content = read_file(url, self.index_file.bytes, self.cache.patience)
        except FileNotFoundError:
            return None
        self.cache.record(url, len(content), began)
        return content

    def local(self, verify: bool = False) -> AbstractContextManager[Path]:
        """As of a local one; the digest is compared whenever the shard is fetched. Raises as `ShardCache.open`."""
        check = functools.partial(check_digest, self.name, entry=self.entry) if self.entry else None
        return self.cache.open(self.name, self.stored, check)


class RemoteFolder:
    """A folder of shards. A web server cannot list it: it is asked for each file."""

    def __init__(self, url: str, settings: CacheSettings) -> None:
        self.url = url
        self.cache = ShardCache(*settings)
        self.files = list_folder(url, self.cache.patience)
        ask = functools.cache(lambda name: look_up(f"{url}/{name}", self.cache.patience))
        self._find: Callable[[str], Stored | None] = ask if self.files is None else self.files.get

    @functools.cached_property
    def manifest(self) -> Manifest:
        url = f"{self.url}/{MANIFEST}"
        found = self._find(MANIFEST)
        if not found:
            return {}
        if found.bytes > MAX_JSON:
            raise DataError(f"{url} has {found.bytes:,} bytes, more than {MAX_JSON:,}")
        return parse_manifest(read_file(url, found.bytes, self.cache.patience), url)

    def size(self, name: str) -> int | None:
        found = self._find(name)
        return found.bytes if found else None

    def names(self, pattern: str) -> Iterable[str]:
        if self.files is None:
            raise DataError(f"{self.url} cannot be listed: name the files, as in {self.url}/{{00000..00099}}.tar")
        return sorted(name for name in self.files if fnmatch.fnmatchcase(name, pattern))

    def shard(self, name: str, entry: ManifestEntry | None) -> Shard:
        last = split(name)[1]
        index = self._find(index_name(last)) if entry else None
        return RemoteShard(name, entry, stored=self._find(last) or Stored(0, ""), cache=self.cache, index_file=index)


class Ahead:
    """Fetches shards in threads, and keeps them in the cache until they are done with.

    What cannot be fetched is left to the worker that needs it, which reports it.
    """

    def __init__(self) -> None:
        self._last: dict[RemoteShard, int] = {}  # the last batch that needs each shard
        self._held: dict[RemoteShard, AbstractContextManager[Path]] = {}
        self._lock = Lock()
        self._queue: SimpleQueue[RemoteShard | None] = SimpleQueue()
        self._threads: list[Thread] = []

    def need(self, number: int, shards: Iterable[RemoteShard]) -> None:
        """Shards that batch `number` needs, or what follows it, the most urgent first."""
        with self._lock:
            wanted = dict.fromkeys(shards, number)
            new = [shard for shard in wanted if shard not in self._last]
            self._last |= wanted
        for shard in new:
            self._queue.put(shard)
        if new and not self._threads:  # daemons: a store that is away must not keep a process from ending
            self._threads = [Thread(target=self._fetch, daemon=True) for _ in range(THREADS)]
            for thread in self._threads:
                thread.start()

    def release(self, number: int) -> None:
        """Lets go of shards that no batch from `number` on needs."""
        with self._lock:
            done = [shard for shard, last in self._last.items() if last < number]
            for shard in done:
                del self._last[shard]
            held = [self._held.pop(shard) for shard in done if shard in self._held]
        for context in held:
            context.__exit__(None, None, None)

    def close(self) -> None:
        self.release(sys.maxsize)
        for _ in self._threads:
            self._queue.put(None)

    def _fetch(self) -> None:
        while shard := self._queue.get():
            context = replace(shard, cache=shard.cache._replace(patience=0)).local(verify=True)
            try:
                with self._lock:
                    if shard not in self._last or shard in self._held:
                        continue
                context.__enter__()
            except (StoreError, CacheFullError):
                time.sleep(PAUSE)
                self._queue.put(shard)
            except Exception:
                continue
            else:
                with self._lock:
                    wanted = shard in self._last and shard not in self._held
                    if wanted:
                        self._held[shard] = context
                if not wanted:
                    context.__exit__(None, None, None)
