"""Shards on an object store (fsspec's memory://), through a cache that is bounded, shared and never torn."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from coca_lit.data.bad_samples import BadSamples
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.data.shards.listing import find_shards
from coca_lit.data.shards.remote import cache as remote
from coca_lit.data.shards.remote.cache import ShardCache
from coca_lit.data.shards.scan import read_shard
from coca_lit.data.shards.shard import locked_cache
from coca_lit.errors import DataError, DataNotFoundError
from helpers.datamodules import TOKENIZER
from helpers.shards import contents, in_memory


@pytest.fixture
def store(tmp_path: Path):
    with in_memory(tmp_path / "local", 4, 6) as filesystem:
        yield filesystem, tmp_path / "local"


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10**6)


def size_of(local: Path) -> int:
    return (local / "00000.tar").stat().st_size


def copies(cache: ShardCache) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in cache.folder.glob("*.tar"))


def laion(shards: str, tmp_path: Path, **more) -> LAIONDataModule:
    more |= {"cache_dir": str(tmp_path / "cache")}
    return LAIONDataModule(shards, None, tokenizer=TOKENIZER, batch_size=4, image_size=16, **more)


@pytest.mark.parametrize("pattern", ["memory://set", "memory://set/{00000..00003}.tar"])
def test_training_reads_the_same_from_afar(store, tmp_path, pattern, monkeypatch):
    monkeypatch.setattr("coca_lit.data.shards.laion.AUTO_BYTES", 0)  # windows of local shards, too
    _, local = store
    far, near = laion(pattern, tmp_path), laion(str(local), tmp_path)
    assert far.steps_per_epoch == near.steps_per_epoch == 6
    assert [index.shard.file_name for index in far.sources[0].shards] == [f"{i:05d}.tar" for i in range(4)]
    for there, here in zip(far.train_dataloader(), near.train_dataloader(), strict=True):
        assert [key.split("/")[-2:] for key in there.keys] == [key.split("/")[-2:] for key in here.keys]
        assert contents(there)[1:] == contents(here)[1:]


def test_changed_lost_and_foreign_shards(store, tmp_path):
    filesystem, _ = store
    with pytest.raises(DataNotFoundError, match=r"1 of 5 .*memory://set/00004\.tar"):
        find_shards("memory://set/{00000..00004}.tar")
    content = filesystem.cat_file("/set/00001.tar")
    filesystem.pipe_file("/set/00001.tar", content + b"x")
    with pytest.raises(DataError, match=r"memory://set/00001\.tar.*bytes.*manifest"):
        laion("memory://set", tmp_path).prepare_data()
    filesystem.rm_file("/set/00001.tar")
    with pytest.raises(DataNotFoundError, match=r"1 of 4 .*memory://set/00001\.tar"):
        laion("memory://set", tmp_path).prepare_data()
    for pattern in ("memory://nowhere/*.tar", "memory://set/deeper/*.tar"):
        with pytest.raises(DataNotFoundError, match="shards not found"):
            find_shards(pattern)


def test_whoever_fetches_a_shard_first_compares_it_with_its_manifest(store, cache):
    filesystem, _ = store
    content = filesystem.cat_file("/set/00001.tar")
    filesystem.pipe_file("/set/00001.tar", content.replace(b"a dog number", b"a cat number"))
    (shard,) = find_shards("memory://set/00001.tar", cache)
    with pytest.raises(DataError, match=r"memory://set/00001\.tar has another sha256"):
        list(read_shard(shard, ["txt"], BadSamples(1.0)))
    assert not copies(cache)


@pytest.mark.parametrize(
    "url",
    ["simplecache::memory://set/*.tar", "memory://a::pipe://set", "http://h/x.tar", "ftp://h/x.tar", "github://x"],
)
def test_other_schemes_and_chains_are_refused(url):
    with pytest.raises(DataError, match=r"s3://, gs://, hf://, https://"):
        find_shards(url)


def test_a_password_is_refused_before_it_is_printed():
    with pytest.raises(DataError, match="password") as error:
        find_shards("https://me:secret@host/x.tar")
    assert "secret" not in str(error.value)


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
            pytest.raises(DataError, match=r"memory://set/00001\.tar.*data\.cache_gb"),
            cache.open("memory://set/00001.tar"),
        ):
            pass
    with cache.open("memory://set/00001.tar"):
        assert copies(cache) == ["00001.tar", "00003.tar"]


def test_files_of_others_in_the_folder_stay(store, tmp_path):
    _, local = store
    cache = ShardCache(tmp_path / "cache", size_of(local) + 100)
    own = [cache.folder / name for name in ("thesis.docx", "00000.tar", "0123456789abcdef.tar", "notes.partial")]
    cache.folder.mkdir()
    for path in own:
        path.write_bytes(bytes(cache.max_bytes))
        os.utime(path, (0, 0))
    for name in ("00001.tar", "00002.tar"):
        with cache.open(f"memory://set/{name}") as path:
            assert path.read_bytes() == (local / name).read_bytes()
    assert [path.stat().st_size for path in own] == [cache.max_bytes] * 4
    assert [*cache.folder.glob("*-*.tar")] == [cache.path("memory://set/00002.tar")]


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
    with pytest.raises(DataError, match=r"memory://set/00001\.tar.*reset"), impatient.open("memory://set/00001.tar"):
        pass
    assert copies(cache) == ["00000.tar"]
    assert not [*cache.folder.glob("*.partial")]


def test_a_question_after_a_download_is_asked_again_alone(store, cache, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    asked, fetched = [], []
    look, get_file = remote.stored, type(store[0]).get_file

    def throttled(filesystem, url):
        asked.append(url)
        if len(asked) == 2:
            raise OSError("slow down")
        return look(filesystem, url)

    def get(self, path, target, **limits):
        fetched.append(path)
        return get_file(self, path, target, **limits)

    monkeypatch.setattr(remote, "stored", throttled)
    monkeypatch.setattr(type(store[0]), "get_file", get)
    with cache._replace(patience=0).open("memory://set/00000.tar"):  # as what is fetched ahead
        pass
    assert (len(asked), len(fetched)) == (3, 1)


def test_a_killed_download_is_begun_again(store, cache):
    _, local = store
    with cache.open("memory://set/00000.tar") as path:
        pass
    partial, room = (path.with_name(path.name + suffix) for suffix in (remote.PARTIAL, remote.ROOM))
    path.rename(partial)
    room.write_bytes(bytes(cache.max_bytes // 2))
    small = cache._replace(max_bytes=room.stat().st_size)  # the dead reservation must go
    with small.open("memory://set/00001.tar"):
        assert not partial.exists()
        assert not room.exists()
    with small.open("memory://set/00000.tar") as path:
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
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= cache.max_bytes


def test_a_lock_that_another_user_made_a_link_empties_no_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("notes")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / ".lock").symlink_to(mine)
    with pytest.raises(DataError, match=r"set data\.cache_dir to a folder of yours"), locked_cache(cache, ".lock"):
        pass
    assert mine.read_text() == "notes"
