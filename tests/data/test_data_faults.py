"""Data that are damaged, change or vanish: counted, named, fatal above the allowed fraction, and never a hang."""

import csv
import itertools
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from test_datamodules import TOKENIZER, fit
from test_shards import spoil, write_shards, write_tar

from coca_lit.callbacks.bad_sample_log import BadSampleLog, read_bad_samples
from coca_lit.cli.data import data as coca_data
from coca_lit.data.bad_samples import BadSamples
from coca_lit.data.datamodule import FlickrDataModule
from coca_lit.data.examples import CaptionDataset, FirstCaptionDataset
from coca_lit.data.loader import open_epoch
from coca_lit.data.prepare.check import JOURNAL
from coca_lit.data.records import ImageFile, Record
from coca_lit.data.scenes.export import export_scenes
from coca_lit.data.shards.datamodule import LAIONDataModule
from coca_lit.data.shards.listing import MANIFEST, Shard, find_shards, read_manifest
from coca_lit.data.shards.mixture import Source
from coca_lit.data.shards.reader import read_shard
from coca_lit.data.shards.stream import ShardOrder
from coca_lit.data.transforms import RandomCrop, build_transform
from coca_lit.errors import DataError, DataNotFoundError

NONE_OF = "it is none of JPEG, PNG, WEBP, BMP, GIF"


def check(*arguments: str) -> None:
    coca_data(["check", *arguments, "--workers", "1"])


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of six samples with their manifest."""
    folder = tmp_path_factory.mktemp("checked") / "shards"
    folder.mkdir()
    write_shards(folder, 3, 6)
    check(str(folder))
    return folder


@pytest.fixture
def shards(checked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checked, tmp_path / "shards"))


def laion(folder: Path, **more) -> LAIONDataModule:
    return LAIONDataModule(str(folder), 24, tokenizer=TOKENIZER, batch_size=4, image_size=16, **more)


def reasons(path: Path) -> dict[str, int]:
    bad = BadSamples(1.0)
    list(read_shard(Shard(str(path)), ["txt"], bad))
    return dict(bad.reasons)


# Shards that break off, are empty or vanish


def test_damage_in_the_middle_is_not_the_end(tmp_path):
    (path,) = write_shards(tmp_path, 1, 6)
    content = bytearray(path.read_bytes())
    at = content.index(b"00003.jpg")
    content[at : at + 512] = b"\xff" * 512
    path.write_bytes(content)
    assert reasons(path) == {"broken or truncated shard": 1}


def test_shards_without_samples(tmp_path):
    assert reasons(write_tar(tmp_path / "empty.tar", {})) == {"empty shard": 1}
    (tmp_path / "none.tar").touch()
    assert reasons(tmp_path / "none.tar") == {"broken or truncated shard": 1}
    assert reasons(tmp_path / "gone.tar") == {"broken or truncated shard": 1}
    empty = [Source("", [Shard(str(tmp_path / "empty.tar"))])]
    with pytest.raises(DataError, match=r"no usable sample: 1 of 1 samples \(1 x empty shard; most in .*empty\.tar"):
        next(ShardOrder(empty).samples(0, 0, 1, BadSamples(1.0)))


@pytest.mark.parametrize("known", [True, False])
def test_a_lost_shard_counts_as_all_its_samples(shards, known):
    if not known:
        (shards / MANIFEST).unlink()
    found = find_shards(str(shards))
    bad = BadSamples(0.4)
    stream = ShardOrder([Source("", found)], shuffle_buffer=1).samples(0, 0, 1, bad)
    list(islice(stream, 18))
    Path(found[1].name).unlink()
    list(islice(stream, 12))  # a third of the second pass is gone, a sixth of all
    assert bad.reasons == {"broken or truncated shard": 6}
    assert bad.shards == {found[1].name: 6}
    for shard in (found[0], found[2]):
        Path(shard.name).unlink()
    with pytest.raises(DataError, match=r"too many bad samples|no usable sample"):
        list(islice(stream, 1000))


def test_where_nothing_may_be_lost_nothing_comes_in_its_place(shards):
    found = find_shards(str(shards))
    bad = BadSamples(0.0)
    stream = ShardOrder([Source("", found)], shuffle_buffer=1).samples(0, 0, 1, bad)
    list(islice(stream, 18))
    lost = found[1].name
    Path(lost).unlink()
    rest = []
    with pytest.raises(DataError, match=rf"too many bad samples.*{lost}"):
        rest.extend(stream)
    assert len(rest) < 12  # the end of a pass without it is never reached
    assert lost not in {sample.sample.shard for sample in rest}


def test_a_file_server_that_is_gone_is_no_endless_loop(shards):
    bad = BadSamples(1.0)  # any fraction is allowed
    stream = ShardOrder([Source("", find_shards(str(shards)))], shuffle_buffer=1).samples(0, 0, 1, bad)
    list(islice(stream, 18))
    shutil.rmtree(shards)
    with pytest.raises(DataError, match="no usable sample"):
        next(stream)


@pytest.mark.parametrize("rank", [0, 1])
def test_too_few_shards_is_one_sentence_on_every_rank(shards, rank):
    data = laion(shards / "00000.tar", indexed=False)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
    with pytest.raises(DataError, match="1 shard cannot feed 2 processes: each needs at least one of its own"):
        data.train_dataloader()


# The manifest


def test_manifest_tells_what_is_there(checked):
    manifest = read_manifest(checked)
    assert {name: entry.samples for name, entry in manifest.items()} == {f"{s:05d}.tar": 6 for s in range(3)}
    assert all(entry.bytes == (checked / name).stat().st_size for name, entry in manifest.items())
    assert LAIONDataModule(str(checked), None, tokenizer=TOKENIZER, batch_size=4).steps_per_epoch == 18 // 4
    assert not (checked / JOURNAL).exists()


def test_epoch_without_samples_needs_a_manifest(tmp_path):
    write_shards(tmp_path, 1, 2)
    with pytest.raises(DataError, match=r"no manifest .* write it with coca-data check, or set data.epoch_samples"):
        LAIONDataModule(str(tmp_path), None, tokenizer=TOKENIZER, batch_size=2, indexed=False).prepare_data()


def test_training_refuses_what_no_longer_fits(shards):
    path = shards / "00001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(512))
    with pytest.raises(DataError, match=r"00001\.tar has .* bytes, but .* according to its manifest\.json"):
        laion(shards).prepare_data()
    changed = bytearray(whole)
    changed[changed.index(b"a dog number")] ^= 1  # same size, and every sample can be read
    path.write_bytes(changed)
    data = laion(shards, indexed=False)
    data.prepare_data()
    with pytest.raises(DataError, match=r"00001\.tar has another sha256 than according to its manifest"):
        list(data.train_dataloader())
    path.write_bytes(whole)
    assert len(list(laion(shards).train_dataloader())) == 6


def test_training_refuses_new_and_lost_shards(shards):
    shutil.copy(shards / "00000.tar", shards / "00009.tar")
    with pytest.raises(DataError, match=r"00009\.tar is not in the manifest"):
        laion(shards).prepare_data()
    (shards / "00009.tar").unlink()
    (shards / "00002.tar").unlink()
    with pytest.raises(DataNotFoundError, match=r"1 of 3 shards not found .*00002\.tar"):
        laion(shards).prepare_data()
    laion(shards / "{00000..00001}.tar").prepare_data()
    (shards / MANIFEST).write_text("[]")
    with pytest.raises(DataError, match=r"manifest\.json is not a manifest of shards: remove it, then write it again"):
        laion(shards).prepare_data()
    (shards / MANIFEST).unlink()
    check(str(shards))
    laion(shards).prepare_data()


def test_check_compares_with_the_manifest(shards, capsys):
    before = (shards / MANIFEST).read_text()
    spoil(shards / "00001.tar", {"10002.jpg": b"junk", "10003.txt": None})
    with pytest.raises(SystemExit, match=r"00001\.tar has changed .*--update"):
        check(str(shards), "--max-bad-fraction", "0.2")
    assert (shards / MANIFEST).read_text() == before
    check(str(shards), "--max-bad-fraction", "0.2", "--update")
    assert read_manifest(shards)["00001.tar"].samples == 4
    said = capsys.readouterr().out
    assert "1 x unreadable image, 1 x missing caption (10002 it is not a readable image: " in said
    assert "3 shards, 16 samples" in said
    (shards / "00000.tar").unlink()
    check(f"{shards}/00002.tar", "--update")  # what was not looked at stays as it was
    assert set(read_manifest(shards)) == {"00001.tar", "00002.tar"}


def test_check_goes_on_after_a_fault(shards, capsys):
    (shards / MANIFEST).unlink()
    path = shards / "00002.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:3000])
    with pytest.raises(
        SystemExit, match=r"1 of 3 shards cannot be used, e\.g\. .*00002\.tar .*no manifest was written"
    ):
        check(str(shards))
    assert not (shards / MANIFEST).exists()
    with (shards / JOURNAL).open("a") as file:
        file.write("[null, [")  # killed while writing
    path.write_bytes(whole)
    check(str(shards))
    assert {entry.samples for entry in read_manifest(shards).values()} == {6}


def test_check_refuses_too_many_bad_samples(shards):
    spoil(shards / "00001.tar", {"10002.jpg": b"junk"})
    with pytest.raises(SystemExit, match=r"1 of 18 samples are bad, more than --max-bad-fraction 0\.05"):
        check(str(shards), "--update")


# Photos of a list that is read in random order


def photos(folder: Path, count: int, broken: set[int]) -> list[Record]:
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        if i in broken:
            path.write_bytes(b"junk")
        else:
            Image.new("RGB", (9, 8), (i, 0, 0)).save(path)
    return [Record(i, ImageFile(path), ("a red circle",)) for i, path in enumerate(paths)]


def test_another_image_stands_in_for_one_that_is_broken(tmp_path):
    dataset = CaptionDataset(photos(tmp_path, 40, {7, 21}), RandomCrop(8), TOKENIZER)
    whole = [batch for epoch in (0, 1) for batch in open_epoch(dataset, 8, epoch)]
    assert all(len(batch.keys) == 8 for batch in whole)
    assert not {"7", "21"} & {key for batch in whole for key in batch.keys}
    assert Counter(found.key for batch in whole for found in batch.bad) == {"7": 2, "21": 2}
    details = [found.detail for batch in whole for found in batch.bad]
    assert all(detail.endswith(".png is not a readable image: " + NONE_OF) for detail in details)
    fresh = CaptionDataset(dataset.records, dataset.transform, TOKENIZER)
    resumed = [batch.keys for batch in open_epoch(fresh, 8, 0, start=2)]
    assert resumed == [batch.keys for batch in whole[2:5]]
    halves = [[batch.keys for batch in open_epoch(dataset, 8, 0, rank=rank, world=2)] for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch.keys) for batch in whole[:5]]


def test_many_broken_images_stop_the_training(tmp_path):
    dataset = CaptionDataset(photos(tmp_path, 20, set(range(19))), RandomCrop(8), TOKENIZER)
    with pytest.raises(DataError, match=r"no usable image in 10 tries: .* unreadable image"):
        list(itertools.chain.from_iterable(open_epoch(dataset, 4, epoch) for epoch in range(20)))
    dataset = CaptionDataset(photos(tmp_path, 250, {1, 2, 3, 4, 5, 6}), RandomCrop(8), TOKENIZER)
    with pytest.raises(
        DataError, match=r"^too many bad samples, more than 1%: \d of 2\d\d samples .*; fix or remove them$"
    ):
        list(open_epoch(dataset, 10, 0))


def test_a_broken_validation_image_is_an_error(tmp_path):
    dataset = FirstCaptionDataset(photos(tmp_path, 2, {1}), build_transform(size=8), TOKENIZER)
    with pytest.raises(DataError, match=r"1\.png is not a readable image"):
        dataset[1]


# What the run folder says


def test_bad_samples_of_a_run_are_listed_once(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    paths = write_shards(shards, 2, 9)
    spoil(paths[0], {"00003.jpg": b"junk", "00005.txt": None})
    fit(laion(shards, max_bad_fraction=0.5), tmp_path / "c", log=(log := BadSampleLog(tmp_path)))
    expected = {("00003", "unreadable image"), ("00005", "missing caption")}
    found = read_bad_samples(log.folder)
    assert {(sample.key, sample.reason) for sample in found} == expected
    assert {sample.shard for sample in found} == {str(paths[0])}
    lines = (log.folder / "rank0.csv").read_text().splitlines()
    (log.folder / "rank0.csv").write_text(lines[0] + "\n" + lines[1][:9])  # killed while writing
    fit(laion(shards, max_bad_fraction=0.5), tmp_path / "d", tmp_path / "c" / "step=4.ckpt", log=BadSampleLog(tmp_path))
    assert (log.folder / "rank0.csv").read_text().splitlines() == lines
    assert list(csv.reader((log.folder / "shards.csv").open())) == [
        ["shard", "reason", "samples"],
        [str(paths[0]), "missing caption", "1"],
        [str(paths[0]), "unreadable image", "1"],
    ]


def test_nothing_is_written_without_bad_samples(tmp_path, shards):
    fit(laion(shards), tmp_path / "c", log=BadSampleLog(tmp_path))
    assert not (tmp_path / "bad_samples").exists()


def test_a_broken_photo_of_a_data_set_is_named(tmp_path):
    export_scenes("flickr8k", tmp_path / "f", 16, 16)
    split = FlickrDataModule(str(tmp_path / "f"), tokenizer=TOKENIZER, batch_size=4, image_size=16, val_split=None)
    broken = split.train_records[3].image.path
    broken.write_bytes(b"junk")
    fit(split, tmp_path / "c", log=(log := BadSampleLog(tmp_path)))
    (found,) = read_bad_samples(log.folder)
    assert str(broken) in found.detail
