"""Windows: an order that a naive loop gives too, equal on any number of processes, and shards that are fetched once."""

import csv
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coca_lit.data.examples import Index
from coca_lit.data.loader import Schedule, ShuffledBatches
from coca_lit.data.mixture import Source, weighted_round_robin
from coca_lit.data.shards.index import TarIndex, make_index
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.data.shards.remote import shards as remote_shards
from coca_lit.data.shards.shard import Shard, Stamp
from coca_lit.data.shards.windows import WindowedBatches, Windows
from coca_lit.distributed import stable_seed
from coca_lit.errors import DataError
from helpers.datamodules import TOKENIZER
from helpers.fuzzing import fuzz
from helpers.shards import contents, in_memory, spoil, write_shards
from helpers.slow import slow

COUNTS = {"a": [7, 5, 0, 11, 8, 3, 9, 4, 6, 10], "b": [5, 9, 2]}  # samples of each shard
SEED = 3


# The order


def index(name: str, count: int) -> TarIndex:
    """Samples of 1024 bytes."""
    nothing = np.zeros(0, np.uint8), np.zeros(count, np.int64), np.zeros((count, 3, 2), np.int64)
    return TarIndex(Shard(name), Stamp(2, 1024 * count, 0, ""), *nothing, faults=[])


def sources(weights: dict[str, float]) -> list[Source]:
    return [
        Source(name, sum(COUNTS[name]), weight, [index(f"{name}{i}", count) for i, count in enumerate(COUNTS[name])])
        for name, weight in weights.items()
    ]


def batches(windows: Windows, weights: dict[str, float], rank: int = 0, world: int = 1) -> WindowedBatches:
    return WindowedBatches(sources(weights), Schedule(720, 24), SEED, 0, 30, rank, world, windows=windows)


def pairs(batch: list[Index]) -> list[tuple[int, int]]:
    return [(index.turn, index.i) for index in batch]


def naive_reader(name: str, first: int, share: float, windows: Windows, reader: int) -> Iterator[tuple[int, int]]:
    """All (pass, i) that a reader reads, one sample after the other."""
    counts = COUNTS[name]
    shards = list(range(len(counts)))
    random.Random(stable_seed("readers", SEED, name)).shuffle(shards)
    rows = [(shard, row) for shard in shards for row in range(counts[shard])]
    mine = rows[len(rows) * reader // windows.readers : len(rows) * (reader + 1) // windows.readers]
    turn = 0
    while True:
        pieces = [[row for row in mine if row[0] == shard] for shard in dict.fromkeys(shard for shard, _ in mine)]
        random.Random(stable_seed("shards", SEED, name, turn, reader)).shuffle(pieces)
        divided = [piece for piece in pieces if len(piece) < counts[piece[0][0]]]
        plan = [*chain(*divided), *chain(*(piece for piece in pieces if piece not in divided))]
        size = max(1, int(min(windows.samples, windows.bytes / 1024) * share / windows.readers))
        for number, start in enumerate(range(0, len(plan), size)):
            window = plan[start : start + size]
            seed = stable_seed("order", SEED, turn, name, str(reader), str(number))
            for i in torch.randperm(len(window), generator=torch.Generator().manual_seed(seed)).tolist():
                yield turn, first + sum(counts[: window[i][0]]) + window[i][1]
        turn += 1


def naive_batches(windows: Windows, weights: dict[str, float]) -> Iterator[list[tuple[int, int]]]:
    starts = dict(zip(weights, (0, sum(COUNTS["a"])), strict=False))
    readers = [
        {name: naive_reader(name, starts[name], share, windows, reader) for name, share in weights.items()}
        for reader in range(windows.readers)
    ]
    turns = weighted_round_robin(list(weights.values()), [0] * len(weights))
    while True:
        batch = [list(weights)[source] for source, _ in islice(turns, 24 // windows.readers)]
        yield [next(streams[name]) for streams in readers for name in batch]


@fuzz
@given(st.data())
def test_a_killed_run_gets_the_batches_of_a_naive_loop_on_any_ranks(data: st.DataObject) -> None:
    weights = data.draw(st.sampled_from([{"a": 1.0}, {"a": 0.7, "b": 0.3}]))
    readers, kilobytes = data.draw(st.sampled_from([1, 2, 4, 12])), data.draw(st.sampled_from([20, 10**6]))
    windows = Windows(data.draw(st.integers(2 * readers, 80)), kilobytes * 1024, readers)
    expected = list(islice(naive_batches(windows, weights), 30))
    start = 0
    while start < 30:
        world, stop = data.draw(st.sampled_from([1, 2, 3, 8])), data.draw(st.integers(start + 1, 30))
        ranks = [replace(batches(windows, weights, r, world), start=start, stop=stop) for r in range(world)]
        assert [pairs([*chain(*parts)]) for parts in zip(*ranks, strict=True)] == expected[start:stop]
        start = stop
    (batch,) = replace(batches(windows, weights), start=17, stop=18)  # without those before it
    assert pairs(batch) == expected[17]


@pytest.mark.parametrize("windows", [Windows(24, 1e9, 3), Windows(10**6, 18 * 1024, 3), Windows(1, 1, 2)])
def test_every_pass_of_a_reader_is_cut_into_windows_within_the_limits(windows):
    (order,) = batches(windows, {"a": 1.0}).orders
    limit = max(1, int(min(windows.samples, windows.bytes / 1024) / windows.readers))
    assert sum(order.per_pass) == sum(COUNTS["a"])
    for turn in range(3):
        found = []
        for reader, count in enumerate(order.per_pass):
            drawn = [order.sample(reader, turn * count + k) for k in range(count)]
            assert {found_turn for found_turn, _ in drawn} == {turn}
            lengths = [sum(piece.samples for piece in window) for window in order._pass(reader, turn).windows]
            assert max(lengths) <= limit
            found += [i for _, i in drawn]
        assert sorted(found) == list(range(sum(COUNTS["a"])))


def test_a_batch_is_mixed_from_the_shards_of_its_windows():
    """The defaults at a hundredth of their size: windows of 2,621 samples of 16 readers, and 200 shards of 100. Of the
    pairs in a batch of a permutation one in 200 is of one shard.
    """
    one, schedule = [Source("", 20_000, shards=[index(str(i), 100) for i in range(200)])], Schedule(20_000, 928)

    def mixing(batches: ShuffledBatches) -> tuple[float, float]:
        """Shards in a batch, and the share of its pairs that are of one shard."""
        found = [Counter(i // 100 for _, i, _ in batch) for batch in batches]
        pairs = [sum(n * (n - 1) for n in counts.values()) / (928 * 927) for counts in found]
        return float(np.mean([len(counts) for counts in found])), float(np.mean(pairs))

    shards, pairs = mixing(WindowedBatches(one, schedule, SEED, 0, 20, windows=Windows(2621, 1e9, 16)))
    assert 42 <= shards <= 1.25 * 42
    assert 1 / 42 <= pairs <= 1 / 26
    shards, pairs = mixing(ShuffledBatches(one, schedule, SEED, 0, 20))
    assert shards > 190
    assert pairs == pytest.approx(1 / 200, rel=0.05)


def test_machines_read_shards_of_their_own_in_every_pass():
    """Four of two readers each; only shards that are divided between neighbours are read by two."""
    windows = Windows(64, 1e9, 8)
    ends = np.cumsum(COUNTS["a"])
    shards = [set() for _ in range(4)]
    for machine in range(4):
        for batch in batches(windows, {"a": 1.0}, machine, 4):
            shards[machine] |= {int(np.searchsorted(ends, i, "right")) for _, i, _ in batch}
    read = Counter(chain(*shards))
    assert len(read) == 9
    assert sum(read.values()) <= 9 + 3


# Remote shards


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote_shards, "PAUSE", 0.02)
    with in_memory(tmp_path / "local", 12, 4) as filesystem:
        yield filesystem, tmp_path / "local"


def laion(tmp_path: Path, shards: str | dict[str, str] = "memory://set", **more) -> LAIONDataModule:
    """Windows of six samples for each of two readers."""
    more = {"cache_dir": str(tmp_path / "cache"), "window": 12, "readers": 2, "window_gb": 1e-3, "seed": SEED} | more
    more = {"epoch_samples": 96, "batch_size": 4} | more
    return LAIONDataModule(shards, tokenizer=TOKENIZER, image_size=16, **more)


def read(data: LAIONDataModule, start: int = 0, rank: int = 0, world: int = 1, stop: int | None = None) -> list:
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
    return list(islice(data.train_dataloader().batches_from(0, start), None if stop is None else stop - start))


def fetched(tmp_path: Path) -> list[tuple[str, int]]:
    with (tmp_path / "cache" / "fetched.csv").open(newline="") as file:
        return [(url.rpartition("/")[2], int(size)) for _, url, size, _ in csv.reader(file)]


def size_of(filesystem) -> int:
    return filesystem.size("/set/00000.tar")


def test_samples_to_look_at_are_of_the_shard_that_training_reads_first(store, tmp_path):
    data = laion(tmp_path)
    keys = [record.id for record in data.drawn_records(100)]
    whole = [found for found in fetched(tmp_path) if found[0].endswith(".tar")]
    first = next(iter(data.indices_from(0, 0)))[0].i // 4
    assert keys == [f"{first}{row:04d}" for row in range(4)]
    assert whole == [(f"{first:05d}.tar", size_of(store[0]))]


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, *slow(2)])
def test_global_batches_are_equal_on_other_ranks_and_workers_and_after_a_resume(store, tmp_path, workers):
    data = laion(tmp_path, epoch_samples=48)
    whole = [contents(batch) for batch in read(data)]
    assert len({key for keys, *_ in whole for key in keys}) == 48
    order = WindowedBatches(data.sources, Schedule(48, 4), SEED, 0, 12, windows=Windows(12, 1e6, 2))
    keys = [f"memory://set/{i:05d}.tar/{i}{row:04d}" for i in range(12) for row in range(4)]
    assert [found for found, *_ in whole] == [[keys[i] for _, i, _ in batch] for batch in order]
    ranks = [read(laion(tmp_path / "other", epoch_samples=48, num_workers=workers), 5, rank, 2) for rank in range(2)]
    parts = [[contents(batch) for batch in found] for found in ranks]
    assert [tuple(a + b for a, b in zip(*both, strict=True)) for both in zip(*parts, strict=True)] == whole[5:]


def test_every_byte_is_fetched_once_through_a_cache_that_is_smaller_than_the_set(store, tmp_path):
    filesystem, _ = store
    data = laion(
        tmp_path, window=8, window_gb=8 / 4 * size_of(filesystem) / 1e9, cache_gb=11 * size_of(filesystem) / 1e9
    )
    assert len({key for batch in read(data, stop=12) for key in batch.keys}) == 48
    used = {Path(row["name"]).name: row["size"] for row in filesystem.ls("/set", detail=True)}
    shards = [(name, size) for name, size in fetched(tmp_path) if name.endswith(".tar")]
    assert sorted(shards[:12]) == sorted((name, size) for name, size in used.items() if name.endswith(".tar"))
    assert len(shards) <= 12 + 8 / 4  # a window of the next pass, where the batches are slower than the store
    others = sum(size for name, size in fetched(tmp_path) if not name.endswith(".tar"))
    assert others <= 0.05 * sum(size for _, size in shards[:12])
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= data.cache.max_bytes


@pytest.mark.parametrize("whole", [True, False])
def test_an_index_is_shipped_or_made_of_what_is_fetched(store, tmp_path, monkeypatch, whole):
    filesystem, local = store
    expected = [make_index(Shard(str(path)), tmp_path) for path in sorted(local.glob("*.tar"))]

    def arrays(indexes: list[TarIndex]) -> list:
        return [(found.keys.tolist(), found.key_ends.tolist(), found.places.tolist()) for found in indexes]

    assert arrays(laion(tmp_path).sources[0].shards) == arrays(expected)
    assert {name for name, _ in fetched(tmp_path)} == {f".{i:05d}.tar.index" for i in range(12)}
    for path in local.glob(".*.index"):
        filesystem.rm_file(f"/set/{path.name}")
    filesystem.rm_file("/set/manifest.json")
    if not whole:
        monkeypatch.setattr("coca_lit.data.shards.remote.store.BLOCK", 512)
    data = laion(tmp_path / "new", cache_gb=(12 if whole else 11.9) * size_of(filesystem) / 1e9, window_gb=1e-6)
    assert arrays(data.sources[0].shards) == arrays(expected)
    sizes = [size for _, size in fetched(tmp_path / "new")]
    assert len(sizes) == 12
    assert sum(sizes) == 12 * size_of(filesystem) if whole else sum(sizes) < 9 * size_of(filesystem)
    assert arrays(laion(tmp_path / "new").sources[0].shards) == arrays(expected)
    assert len(fetched(tmp_path / "new")) == 12


def test_an_index_of_other_content_is_not_believed(store, tmp_path):
    """It has the size of the shard, but another digest, or is damaged."""
    filesystem, _ = store
    (tmp_path / "other").mkdir()
    other = make_index(Shard(str(write_shards(tmp_path / "other", 1, 4)[0])), tmp_path)  # without a manifest
    assert other.stamp.bytes == size_of(filesystem)
    filesystem.pipe_file("/set/.00000.tar.index", (tmp_path / "other" / ".00000.tar.index").read_bytes())
    filesystem.pipe_file("/set/.00001.tar.index", b"junk")
    indexes = laion(tmp_path).sources[0].shards
    assert [found.key(0) for found in indexes] == [f"{i}0000" for i in range(12)]
    assert {"00000.tar", "00001.tar"} <= {name for name, _ in fetched(tmp_path)}


def test_what_comes_next_is_fetched_ahead_and_what_is_done_goes(store, tmp_path, monkeypatch):
    """Nobody reads, and still the shards of the next window come, as soon as the store is back."""
    filesystem, _ = store
    fetch, faults = type(filesystem).get_file, [OSError("reset")] * 3

    def get_file(self, *arguments):
        if faults:
            raise faults.pop()
        fetch(self, *arguments)

    monkeypatch.setattr(type(filesystem), "get_file", get_file)
    data = laion(tmp_path)
    sampler = data.train_dataloader().batches_from(0, 0).batch_sampler
    batch = iter(sampler)

    for number in range(12):
        next(batch)
        wanted = {
            shard for reader in range(2) for _, shard in sampler.orders[0].shards(reader, 2 * number, 2 * number + 1)
        }
        end = time.monotonic() + 120
        names = {f"{shard:05d}.tar" for shard in wanted}
        while not names <= {path.name[17:] for path in (tmp_path / "cache").glob("*.tar")}:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert number or len(names) < 12
    assert [*(tmp_path / "cache").glob("*.reader")]
    batch.close()
    while [*(tmp_path / "cache").glob("*.reader")]:  # of what is just being fetched
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_shard_is_held_until_the_workers_have_read_it(store, tmp_path, monkeypatch, workers):
    """Each of them may still have two batches to read."""
    let_go = []

    class Watched(remote_shards.Ahead):
        def release(self, number: int) -> None:
            let_go.append(number)
            super().release(number)

    monkeypatch.setattr(remote_shards, "Ahead", Watched)
    sampler = laion(tmp_path, num_workers=workers).train_dataloader().batches_from(0, 0).batch_sampler
    for number, _ in enumerate(islice(sampler, 12)):
        assert let_go[number] == number - 2 * workers


def test_the_cache_has_room_for_three_windows():
    """Of 100 bytes for all readers, each beginning and ending within a shard of 10 for either of two."""
    assert Windows(8, 100.0, 2).cache_bytes(largest=10, sources=1) == 3 * 100 + 2 * (10 + 10)


def test_the_cache_has_room_for_what_workers_still_read(store, tmp_path):
    """Two workers make four batches ahead, of one shard each."""
    filesystem, _ = store
    largest = max(row["size"] for row in filesystem.ls("/set", detail=True) if row["name"].endswith(".tar"))
    room = {"window_gb": 1e-9, "cache_gb": 5 * largest / 1e9}  # for two readers: four shards and three tiny windows
    laion(tmp_path, **room).prepare_data()
    with pytest.raises(DataError, match=r"data\.cache_gb"):
        laion(tmp_path, **room, num_workers=2).prepare_data()


def test_the_cache_has_room_for_a_thin_shard(store, tmp_path):
    """Two batches of four wait: one sample of one shard, and seven of others, which have four each."""
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    from pyarrow import parquet

    chosen = [(f"{s:05d}.tar", f"{s}{i:04d}") for s in range(12) for i in range(4) if s or not i]
    table = dict(zip(("shard", "key"), map(list, zip(*chosen, strict=True)), strict=True))
    parquet.write_table(pa.table(table), tmp_path / "kept.parquet")
    shards = 2 * 2 + 1 + 7 / 4  # for two readers four of them
    more = {"window_gb": 1e-12, "num_workers": 1, "selection": str(tmp_path / "kept.parquet")}
    laion(tmp_path, cache_gb=(shards + 0.1) * size_of(store[0]) / 1e9, **more).prepare_data()
    with pytest.raises(DataError, match=r"data\.cache_gb"):
        laion(tmp_path, cache_gb=(shards - 0.1) * size_of(store[0]) / 1e9, **more).prepare_data()


def test_a_changed_shard_is_refused(store, tmp_path):
    """With a manifest the run ends; without one its samples are bad ones, as on a local disk."""
    filesystem, local = store
    data = laion(tmp_path)
    data.prepare_data()
    spoil(local / "00007.tar", {"70000.txt": b"the same size!"[:14]})
    changed = (local / "00007.tar").read_bytes()
    assert len(changed) == size_of(filesystem)
    filesystem.pipe_file("/set/00007.tar", changed)
    with pytest.raises(DataError, match=r"00007\.tar.*sha256"):
        read(laion(tmp_path / "again"))
    data.max_bad_fraction = 0.5
    found = read(data)
    assert {(bad.shard, bad.reason) for batch in found for bad in batch.bad} == {
        ("memory://set/00007.tar", "shard changed after it was indexed")
    }


def test_a_lost_shard_is_replaced_by_the_next_and_asked_for_once(store, tmp_path, monkeypatch):
    filesystem, _ = store
    data = laion(tmp_path, max_bad_fraction=0.5)
    undisturbed = read(laion(tmp_path / "other"))
    data.prepare_data()
    filesystem.rm_file("/set/00011.tar")
    found = read(data)
    assert [(bad.shard, bad.reason) for batch in found for bad in batch.bad] == [
        ("memory://set/00011.tar", "unreadable shard")
    ] * 8
    for before, after in zip(undisturbed, found, strict=True):
        assert [key for key in before.keys if "00011" not in key] == [
            key for key, old in zip(after.keys, before.keys, strict=True) if "00011" not in old
        ]
        assert all("00000.tar" in key for key, old in zip(after.keys, before.keys, strict=True) if "00011" in old)


def test_a_bad_sample_is_replaced_by_one_of_its_shard(store, tmp_path):
    filesystem, local = store
    spoil(local / "00002.tar", {"20001.jpg": b"junk"})
    filesystem.pipe_file("/sad/00002.tar", (local / "00002.tar").read_bytes())
    filesystem.pipe_file("/sad/00003.tar", (local / "00003.tar").read_bytes())
    found = read(laion(tmp_path, "memory://sad", max_bad_fraction=1.0))
    filesystem.rm("/sad", recursive=True)
    assert {(bad.key, bad.reason) for batch in found for bad in batch.bad} == {("20001", "unreadable image")}
    keys = Counter(key.rpartition("/")[2] for batch in found for key in batch.keys)
    assert keys["20001"] == 0
    assert sum(count for key, count in keys.items() if key[0] == "2") == 48


def test_a_shard_of_bad_samples_is_replaced_by_the_next(store, tmp_path):
    filesystem, local = store
    spoil(local / "00011.tar", {f"11{i:04d}.jpg": b"junk" for i in range(4)})
    for name in ("00000.tar", "00011.tar"):
        filesystem.pipe_file(f"/sad/{name}", (local / name).read_bytes())
    found = read(laion(tmp_path, "memory://sad", max_bad_fraction=1.0))
    filesystem.rm("/sad", recursive=True)
    assert [len(batch.keys) for batch in found] == [4] * 24
    assert all("00000.tar" in key for batch in found for key in batch.keys)
    assert sum(len(batch.bad) for batch in found) == 48 * 10  # half of the samples


def test_a_mixture_of_near_and_far_keeps_its_shares(store, tmp_path):
    _, local = store
    shards = {"far": "memory://set", "near": str(local)}
    found = read(laion(tmp_path, shards, batch_size=20, epoch_samples=80, weights={"far": 0.7, "near": 0.3}))
    assert [Counter(batch.extras["source"]) for batch in found] == [{"far": 14, "near": 6}] * 4


# Which order


def test_what_is_read_how(store, tmp_path, monkeypatch):
    _, local = store
    assert laion(tmp_path, str(local)).windows is None
    assert laion(tmp_path).windows == Windows(12, 1e6, 2)
    with pytest.raises(DataError, match=r"data\.cache_gb"):
        laion(tmp_path, cache_gb=1e-5).prepare_data()
    with pytest.raises(ValueError, match=r"window.*0"):
        laion(tmp_path, window=0)

    def keys(data: LAIONDataModule) -> list[str]:
        return [key.rpartition("/")[2] for batch in read(data) for key in batch.keys]

    near = keys(laion(tmp_path, str(local)))
    monkeypatch.setattr("coca_lit.data.shards.laion.AUTO_BYTES", 1000)
    assert laion(tmp_path, str(local)).windows
    assert near != keys(laion(tmp_path, str(local))) == keys(laion(tmp_path))
