"""Shards on an object store (fsspec's memory://), through a cache that is bounded, shared and never torn."""

import multiprocessing
import time
from itertools import islice
from pathlib import Path

import fsspec
import pytest
from test_datamodules import TOKENIZER
from test_shards import contents, write_shards

from coca_lit.cli.data import data as coca_data
from coca_lit.data.shards import cache as remote
from coca_lit.data.shards.cache import ShardCache
from coca_lit.data.shards.datamodule import LAIONDataModule
from coca_lit.data.shards.listing import find_shards
from coca_lit.errors import DataError, DataNotFoundError


@pytest.fixture
def store(tmp_path: Path):
    """memory://set with four shards and their manifest, and the same on disk."""
    local = tmp_path / "local"
    local.mkdir()
    write_shards(local, 4, 6)
    coca_data(["check", str(local), "--workers", "1"])
    filesystem = fsspec.filesystem("memory")
    for path in local.iterdir():
        filesystem.pipe_file(f"/set/{path.name}", path.read_bytes())
    yield filesystem, local
    filesystem.rm("/set", recursive=True)


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10**6)


def size_of(local: Path) -> int:
    return (local / "00000.tar").stat().st_size


def copies(cache: ShardCache) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in cache.folder.glob("*.tar"))


def laion(shards: str, tmp_path: Path, **more) -> LAIONDataModule:
    """A stream; windows are in test_windows.py."""
    more |= {"cache_dir": str(tmp_path / "cache"), "indexed": False}
    return LAIONDataModule(shards, None, tokenizer=TOKENIZER, batch_size=4, image_size=16, **more)


@pytest.mark.parametrize("pattern", ["memory://set", "memory://set/*.tar", "memory://set/{00000..00003}.tar"])
def test_training_reads_the_same_from_afar(store, tmp_path, pattern):
    _, local = store
    far, near = laion(pattern, tmp_path), laion(str(local), tmp_path)
    assert far.steps_per_epoch == near.steps_per_epoch == 6
    assert [s.name.rpartition("/")[2] for s in far.sources[0].shards] == [f"{i:05d}.tar" for i in range(4)]
    # The order of shards is drawn by position, so the batches are the same.
    for there, here in zip(far.train_dataloader(), near.train_dataloader(), strict=True):
        assert [key.split("/")[-2:] for key in there.keys] == [key.split("/")[-2:] for key in here.keys]
        assert contents(there)[1:] == contents(here)[1:]


def test_workers_share_the_copies(store, tmp_path):
    data = laion("memory://set", tmp_path, num_workers=2)
    assert len(list(data.train_dataloader())) == 6
    assert copies(data.cache) == [f"{i:05d}.tar" for i in range(4)]


def test_file_urls_are_local(store, tmp_path):
    _, local = store
    (shard, *_) = find_shards(f"file://{local}/*.tar")
    assert (shard.name, shard.cache) == (f"{local}/00000.tar", None)


def test_changed_lost_and_foreign_shards(store, tmp_path):
    filesystem, _ = store
    with pytest.raises(DataNotFoundError, match=r"1 of 5 shards not found .*memory://set/00004\.tar"):
        find_shards("memory://set/{00000..00004}.tar")
    content = filesystem.cat_file("/set/00001.tar")
    filesystem.pipe_file("/set/00001.tar", content + b"x")
    with pytest.raises(DataError, match=r"memory://set/00001\.tar has .* bytes, but .* according to its manifest"):
        laion("memory://set", tmp_path).prepare_data()
    filesystem.rm_file("/set/00001.tar")
    with pytest.raises(DataNotFoundError, match=r"1 of 4 shards not found .*memory://set/00001\.tar"):
        laion("memory://set", tmp_path).prepare_data()
    with pytest.raises(DataNotFoundError, match="there is no bucket memory://nowhere"):
        find_shards("memory://nowhere/*.tar")
    with pytest.raises(DataNotFoundError, match="shards not found"):
        find_shards("memory://set/deeper/*.tar")


@pytest.mark.parametrize(
    "url",
    ["simplecache::memory://set/*.tar", "memory://a::pipe://set", "http://h/x.tar", "ftp://h/x.tar", "github://x"],
)
def test_other_schemes_and_chains_are_refused(url):
    with pytest.raises(DataError, match=r"from local paths and from s3://, gs://, hf://, https:// only"):
        find_shards(url)


def test_a_password_is_refused_before_it_is_printed():
    with pytest.raises(DataError, match="must not hold a user and a password") as error:
        find_shards("https://me:secret@host/x.tar")
    assert "secret" not in str(error.value)


def test_a_missing_backend_is_one_sentence(monkeypatch):
    def absent(scheme: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", absent)
    with pytest.raises(DataError, match=r"s3://bucket needs an optional package: pip install 'coca_lit\[remote\]'"):
        find_shards("s3://bucket/x.tar")


def test_the_longest_unused_make_room_but_none_that_is_open(store, tmp_path):
    _, local = store
    cache = ShardCache(tmp_path / "cache", 2 * size_of(local) + 100)
    with cache.open("memory://set/00000.tar") as first:
        for i in (1, 2, 3):
            with cache.open(f"memory://set/{i:05d}.tar") as path:
                assert path.read_bytes() == (local / f"{i:05d}.tar").read_bytes()
        assert copies(cache) == ["00000.tar", "00003.tar"]  # the first is older, and open
        assert first.read_bytes() == (local / "00000.tar").read_bytes()
        with (
            cache.open("memory://set/00003.tar"),
            pytest.raises(DataError, match=r"has no room for memory://set/00001\.tar .*raise data\.cache_gb"),
            cache.open("memory://set/00001.tar"),
        ):
            pass
    with cache.open("memory://set/00001.tar"):
        assert copies(cache) == ["00001.tar", "00003.tar"]


def test_downloads_are_whole_tried_again_and_given_up(store, cache, monkeypatch):
    filesystem, local = store
    cache.folder.mkdir()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    faults = [OSError("reset"), "cut", None, OSError("reset")]

    def get_file(path: str, target: str) -> None:
        match faults.pop(0):
            case OSError() as error:
                raise error
            case fault:
                content = (local / "00000.tar").read_bytes()
                Path(target).write_bytes(content[:100] if fault else content)

    monkeypatch.setattr(type(filesystem), "get_file", lambda self, path, target: get_file(path, target))
    with cache.open("memory://set/00000.tar") as path:
        assert path.read_bytes() == (local / "00000.tar").read_bytes()
    impatient = cache._replace(patience=0)
    with pytest.raises(DataError, match=r"does not answer.*reset"), impatient.open("memory://set/00001.tar"):
        pass
    assert copies(cache) == ["00000.tar"]
    assert not [*cache.folder.glob("*.partial")]


def test_a_killed_download_is_begun_again(store, cache):
    _, local = store
    with cache.open("memory://set/00000.tar") as path:
        pass
    partial, room = (path.with_name(path.name + suffix) for suffix in (remote.PARTIAL, remote.ROOM))
    path.rename(partial)
    room.write_bytes(bytes(cache.max_bytes // 2))
    small = cache._replace(max_bytes=room.stat().st_size)  # the dead reservation must go
    with small.open("memory://set/00001.tar"), small.open("memory://set/00000.tar") as path:
        assert path.read_bytes() == (local / "00000.tar").read_bytes()
    assert not partial.exists()
    assert not room.exists()


def read_often(cache: ShardCache, local: Path, seed: int) -> None:
    for i in range(60):
        name = f"{(i * (seed + 1) + seed) % 4:05d}.tar"
        with cache.open(f"memory://set/{name}") as path:
            assert path.read_bytes() == (local / name).read_bytes()
            with cache.accounts():
                assert sum(file.stat().st_size for file in cache.folder.glob("*.tar")) <= cache.max_bytes


@pytest.mark.slow
def test_many_processes_share_a_small_cache(store, tmp_path):
    _, local = store
    cache = ShardCache(tmp_path / "cache", 3 * size_of(local) + 100)
    processes = [
        multiprocessing.get_context("fork").Process(target=read_often, args=(cache, local, i)) for i in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= cache.max_bytes


def test_a_shard_that_cannot_be_fetched_is_a_bad_one(store, tmp_path, monkeypatch):
    filesystem, _ = store
    data = laion("memory://set", tmp_path, max_bad_fraction=0.5, shuffle_buffer=1)
    data.prepare_data()
    filesystem.rm_file("/set/00002.tar")
    batches = list(islice(data.train_dataloader().open_at(0, 0), 6))
    assert {found.shard for batch in batches for found in batch.bad} == {"memory://set/00002.tar"}
