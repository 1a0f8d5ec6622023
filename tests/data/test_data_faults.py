"""Data that are damaged, change or vanish: counted, named, fatal above the allowed fraction, and never a hang."""

import csv
import itertools
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from coca_lit.callbacks.guards import BadSampleLog, read_bad_samples
from coca_lit.data.examples import CaptionDataset, Index
from coca_lit.data.records import ImageFile, Record
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.data.shards.shard import MANIFEST, read_manifest
from coca_lit.data.transforms import RandomCrop
from coca_lit.errors import DataError, DataNotFoundError
from coca_lit.tools.prepare.check import JOURNAL
from coca_lit.tools.prepare.command import data as coca_data
from helpers.datamodules import TOKENIZER, fit
from helpers.epochs import open_epoch
from helpers.shards import read, spoil, write_shards

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


# Shards that break off, are empty or vanish


def test_damage_in_the_middle_is_not_the_end(tmp_path):
    (path,) = write_shards(tmp_path, 1, 6)
    content = bytearray(path.read_bytes())
    at = content.index(b"00003.jpg")
    content[at : at + 512] = b"\xff" * 512
    path.write_bytes(content)
    assert read(path)[1] == {"broken or truncated shard": 1}


def test_where_nothing_may_be_lost_nothing_comes_in_its_place(shards):
    data = laion(shards, max_bad_fraction=0.0)
    data.prepare_data()
    lost = shards / "00001.tar"
    lost.unlink()
    rest = []
    with pytest.raises(DataError, match=rf"1 of .*{lost}"):
        rest.extend(data.train_dataloader())
    assert not any(str(lost) in key for batch in rest for key in batch.keys)


def test_a_file_server_that_is_gone_is_no_endless_loop(shards):
    data = laion(shards, max_bad_fraction=1.0)  # any fraction is allowed
    data.prepare_data()
    shutil.rmtree(shards)
    with pytest.raises(DataError, match="100 tries"):
        next(iter(data.train_dataloader()))


# The manifest


def test_training_refuses_what_no_longer_fits(shards):
    path = shards / "00001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(512))
    with pytest.raises(DataError, match=r"00001\.tar.*bytes.*manifest\.json"):
        laion(shards).prepare_data()
    changed = bytearray(whole)
    changed[changed.index(b"a dog number")] ^= 1  # same size, and every sample can be read
    path.write_bytes(changed)
    with pytest.raises(DataError, match=r"00001\.tar .*sha256"):
        laion(shards).prepare_data()
    path.write_bytes(whole)
    assert len(list(laion(shards).train_dataloader())) == 6


def test_training_refuses_new_and_lost_shards(shards):
    shutil.copy(shards / "00000.tar", shards / "00009.tar")
    with pytest.raises(DataError, match=r"00009\.tar.*manifest"):
        laion(shards).prepare_data()
    (shards / "00009.tar").unlink()
    (shards / "00002.tar").unlink()
    with pytest.raises(DataNotFoundError, match=r"1 of 3 .*00002\.tar"):
        laion(shards).prepare_data()
    laion(shards / "{00000..00001}.tar").prepare_data()
    (shards / MANIFEST).write_text("[]")
    with pytest.raises(DataError, match=r"manifest\.json"):
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
    with pytest.raises(SystemExit, match=r"1 of 3 .*00002\.tar"):
        check(str(shards))
    assert not (shards / MANIFEST).exists()
    with (shards / JOURNAL).open("a") as file:
        file.write("[null, [")  # killed while writing
    path.write_bytes(whole)
    check(str(shards))
    assert {entry.samples for entry in read_manifest(shards).values()} == {6}


def test_check_decodes_nothing_again_that_was_stopped_at_an_index(shards):
    """What a second one would find broken has its old time and size."""
    index, decoded = shards / ".00000.tar.index", shards / "00001.tar"
    index.unlink()
    index.mkdir()
    with pytest.raises(SystemExit, match="1 of 1 shards failed"):
        check(str(shards))
    index.rmdir()
    content, times = decoded.read_bytes(), decoded.stat()
    decoded.write_bytes(content.replace(b"\xff\xd8\xff", b"xxx"))
    os.utime(decoded, ns=(times.st_atime_ns, times.st_mtime_ns))
    check(str(shards))
    assert index.is_file()


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
    dataset = CaptionDataset(photos(tmp_path, 2, {0, 1}), RandomCrop(8), TOKENIZER)
    with pytest.raises(DataError, match=r"10 tries"):
        list(itertools.chain.from_iterable(open_epoch(dataset, 2, epoch) for epoch in range(20)))
    dataset = CaptionDataset(photos(tmp_path, 250, {1, 2, 3, 4, 5, 6}), RandomCrop(8), TOKENIZER)
    with pytest.raises(
        DataError,
        match=r"^too many bad samples, at least 3 of 250 records, e\.g\. \d: .*\.png is .*; fix or remove them$",
    ):
        list(open_epoch(dataset, 10, 0))


@pytest.mark.parametrize("count", [30, 100, 240])
def test_two_broken_photos_never_stop_a_training(tmp_path, count):
    """However often they are drawn, and whichever of four workers has them."""
    datasets = [CaptionDataset(photos(tmp_path, count, {3, 17}), RandomCrop(8), TOKENIZER) for _ in range(4)]
    for turn in range(30):
        for i in random.Random(turn).sample(range(count), count):
            assert datasets[random.Random(f"{turn} {i}").randrange(4)][Index(turn, i)].key not in ("3", "17")


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
