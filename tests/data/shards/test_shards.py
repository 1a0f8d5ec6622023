"""Shards from strangers: hostile, broken and incomplete ones, and those that cannot be read."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from coca_lit.data.bad_samples import BadSamples
from coca_lit.data.datasets.annotations import file_name
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.data.shards.listing import find_shards, local_shards
from coca_lit.data.shards.scan import read_shard
from coca_lit.data.shards.shard import Shard
from coca_lit.errors import DataError, DataNotFoundError
from coca_lit.tools.prepare.write import _from_shard
from helpers.running import ROOT
from helpers.shards import TOKENIZER, jpeg, read, spoil, write_shards, write_tar


def local(paths: list[Path]) -> list[Shard]:
    return [Shard(str(path)) for path in paths]


def test_quiet_silences_broken_shards_of_its_count_and_nothing_else(tmp_path, caplog):
    torn = tmp_path / "torn.tar"
    torn.write_bytes(b"junk" * 200)
    quiet = BadSamples(1.0, quiet=True)
    assert not [*read_shard(Shard(str(torn)), ["txt"], quiet)]
    assert quiet.reasons.total() == 1
    assert not caplog.records
    read(torn)
    assert "torn.tar is broken" in caplog.text
    assert "skipped 1" in caplog.text
    assert len(caplog.records) == 2


# --- which shards


def test_find_shards(tmp_path):
    paths = write_shards(tmp_path, 3, 1)
    assert find_shards(f"{tmp_path}/{{00000..00002}}.tar") == local(paths)
    assert find_shards(f"{tmp_path}/*.tar") == local(paths)
    assert find_shards(f"file://{tmp_path}/0000[12].tar") == local(paths[1:])
    hidden = tmp_path / "._00000.tar"  # as macOS leaves beside files on some disks
    hidden.write_bytes(b"junk")
    assert find_shards(str(tmp_path)) == find_shards(f"{tmp_path}/*.tar") == local(paths)
    assert find_shards(f"{tmp_path}/.*.tar") == find_shards(str(hidden)) == local([hidden])
    assert find_shards([str(paths[2]), f"{tmp_path}/*.tar"]) == local([paths[2], *paths[:2]])


@pytest.mark.parametrize("folder", ["laion [v2]", "laion {v2,v3}", "laion {v2"])
def test_names_with_brackets_and_braces(tmp_path, folder):
    (tmp_path / folder).mkdir()
    paths = [str(path) for path in write_shards(tmp_path / folder, 2, 1)]
    assert [shard.name for shard in find_shards(str(tmp_path / folder))] == paths
    assert [shard.name for shard in find_shards(paths)] == paths


def test_patterns_in_a_folder_with_brackets(tmp_path):
    folder = tmp_path / "laion [v2]"
    folder.mkdir()
    paths = [str(path) for path in write_shards(folder, 2, 1)]
    for pattern in ("*.tar", "0000?.tar", "{00000..00001}.tar"):
        assert [shard.name for shard in find_shards(f"{folder}/{pattern}")] == paths
    with pytest.raises(DataNotFoundError, match=r"1 of 3 .*00002\.tar"):
        find_shards(f"{folder}/{{00000..00002}}.tar")


def test_paths_of_windows(tmp_path, monkeypatch):
    """A drive is no scheme, and a backslash separates folders."""
    (tmp_path / "C:" / "shards").mkdir(parents=True)
    write_shards(tmp_path / "C:" / "shards", 2, 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sep", "\\")
    for pattern in (r"C:\shards\{00000..00001}.tar", r"C:\shards\*.tar"):
        assert local_shards(pattern) == [Path("C:/shards/00000.tar"), Path("C:/shards/00001.tar")]
    assert Shard(r"C:\shards\00000.tar").file_name == "00000.tar"
    assert file_name(r"photos\a.jpg") == "photos/a.jpg"


def test_missing_shards_are_named(tmp_path):
    write_shards(tmp_path, 2, 1)
    with pytest.raises(DataNotFoundError, match=r"1 of 3 .*00002\.tar"):
        find_shards(f"{tmp_path}/{{00000..00002}}.tar")
    with pytest.raises(DataNotFoundError, match=r"shards not found .*nothing-\*\.tar"):
        find_shards(f"{tmp_path}/nothing-*.tar")


# --- what is in them


def test_read_shard(tmp_path):
    (path,) = write_shards(tmp_path, 1, 2)
    sample, _ = read_shard(Shard(str(path)), ["txt"], BadSamples(0))
    assert (sample.id, sample.image.content, sample.captions) == ("00000", jpeg(0), ("a dog number",))
    assert [s.captions for s in read_shard(Shard(str(path)), ["recaption"], BadSamples(0))] == [("a dog",)] * 2
    assert read(path, "nothing") == ([], {"no caption in the JSON under nothing": 2})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_of_windows_are_read(tmp_path, encoding):
    files = {
        f"{i}.{end}": content for i in (0, 1) for end, content in (("jpg", jpeg(i)), ("txt", "größe".encode(encoding)))
    }
    path = write_tar(tmp_path / "x.tar", files)
    assert [s.captions for s in read_shard(Shard(str(path)), ["txt"], BadSamples(0))] == [("größe",)] * 2
    assert [captions for *_, captions, _ in _from_shard(path, BadSamples(0))] == [("größe",)] * 2


def test_two_stars_are_folders_of_any_depth(tmp_path, monkeypatch):
    places = [tmp_path / "0.tar", tmp_path / "a" / "1.tar", tmp_path / "a" / "b" / "2.tar"]
    for place in places:
        place.parent.mkdir(exist_ok=True)
        place.touch()
    assert local_shards(f"{tmp_path}/**/*.tar") == places
    monkeypatch.chdir(tmp_path)
    assert sorted(map(Path.resolve, local_shards("**/*.tar"))) == places


def test_incomplete_samples_are_counted_by_reason(tmp_path):
    (path,) = write_shards(tmp_path, 1, 6)
    spoil(path, {"00001.txt": None, "00002.txt": b" \n", "00003.jpg": None})
    assert read(path) == (["00000", "00004", "00005"], {"missing caption": 2, "missing image": 1})


def test_truncated_and_foreign_shards_are_counted(tmp_path):
    (path,) = write_shards(tmp_path, 1, 6)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        info = tar.getmember("00003.jpg")
    for cut in (info.offset_data + 10, info.offset + 100, info.offset):  # in a member, in a header, between members
        path.write_bytes(whole[:cut])
        keys, reasons = read(path)
        assert set(keys) <= {"00000", "00001", "00002"}
        assert len(keys) >= 2
        assert reasons == {"broken or truncated shard": 1}
    for junk in (b"", b"not a tar" * 500):
        path.write_bytes(junk)
        assert read(path) == ([], {"broken or truncated shard": 1})


def test_bad_samples_are_judged_after_enough_were_seen():
    bad = BadSamples(0.05)
    for seen in range(1, 200):
        bad.seen = seen
        bad.add("missing caption", "x.tar")  # 100 % bad, but too early to say
    bad.seen = 200
    with pytest.raises(DataError, match="200 of 200 samples"):
        bad.add("missing caption", "x.tar")
    with pytest.raises(ValueError, match="between 0 and 1, not 5"):
        BadSamples(5)


def laion(folder: Path, samples: int | None = None, **more) -> LAIONDataModule:
    return LAIONDataModule(f"{folder}/*.tar", samples, tokenizer=TOKENIZER, batch_size=4, image_size=16, **more)


def test_unreadable_images_are_replaced_and_batches_stay_full(tmp_path, caplog):
    paths = write_shards(tmp_path, 2, 12)
    spoil(paths[0], {"00005.jpg": jpeg(3)[:200], "00006.jpg": b"junk"})
    found = list(laion(tmp_path, max_bad_fraction=0.5).train_dataloader())
    assert [len(batch.keys) for batch in found] == [4] * 6
    assert {bad.key for batch in found for bad in batch.bad} == {"00005", "00006"}  # one stood in for the other
    assert not {"00005", "00006"} & {key.rpartition("/")[2] for batch in found for key in batch.keys}
    assert f"unreadable image; most in {paths[0]} (2)" in caplog.text


@pytest.mark.slow
def test_local_shards_load_nothing_that_remote_ones_need(tmp_path):
    write_shards(tmp_path, 2, 4)
    program = f"""
import sys
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.tokenizer import WordTokenizer
data = LAIONDataModule("{tmp_path}", None, tokenizer=WordTokenizer(["a"]), batch_size=2, image_size=16)
print(len(list(data.train_dataloader())), *sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    batches, *modules = done.stdout.split()
    assert batches == "4"
    variants = {"encoded", "feature_cache", "shards.windows"}
    assert not {f"coca_lit.data.{name}" for name in variants} & {*modules}
    assert not [name for name in modules if name.startswith(("coca_lit.data.shards.remote", "s3fs", "pyarrow"))]


def test_a_caption_of_more_bytes_than_are_read_is_none(tmp_path):
    texts = {"a": "é" * 2**19, "b": "é" * 2**19 + "x", "c": "x" * 2**20, "d": "x" * 2**20 + "x"}
    files = {
        f"{key}.{end}": data for key, text in texts.items() for end, data in (("jpg", jpeg()), ("txt", text.encode()))
    }
    assert read(write_tar(tmp_path / "x.tar", files)) == (["a", "c"], {"missing caption": 2})
