"""`coca-data prepare`: every kind of source, the same bytes every time, and on from where it was interrupted."""

import csv
import errno
import functools
import json
import multiprocessing
import os
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from coca_lit.data.datasets.folder import folder_records
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.data.shards.shard import MANIFEST, read_manifest
from coca_lit.errors import DataError
from coca_lit.tools.prepare import write as prepare
from coca_lit.tools.prepare.check import check_shard
from coca_lit.tools.prepare.command import data as coca_data
from coca_lit.tools.prepare.write import Pair, read_pairs
from helpers.scene_files import write_data_set
from helpers.shards import TOKENIZER, members, read, write_tar


def run(source: Path, output: Path, *more: str) -> None:
    coca_data(["prepare", str(source), str(output), "--workers", "1", *more])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """photos/0.jpg to 6.jpg, and further formats."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(7):
        Image.new("RGB", (12, 10 + i), (30 * i, 5, 5)).save(folder / f"{i}.jpg")
    for end in ("png", "webp", "gif", "bmp"):
        Image.new("RGB", (9, 9), (9, 200, 9)).save(folder / f"x.{end}")
    return folder


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """By key, in order, of all shards."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, end = member.name.partition(".")
                found.setdefault(key, {})[end] = tar.extractfile(member).read()
                assert (member.mtime, member.uid, member.mode) == (0, 0, 0o644)
    return found


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if not path.name.startswith(".")}


def table(path: Path, rows: list[tuple], head: tuple = ("image", "caption")) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([head, *rows])
    return path


def test_csv(photos, tmp_path, capsys):
    rows = [(f"photos/{i}.jpg", f'a dog, {i} "quoted"') for i in range(7)] + [("photos/2.jpg", "the\nsame  one")]
    rows += [("photos/none.jpg", "lost"), ("photos/4.jpg", "")]
    run(table(tmp_path / "t.csv", rows), tmp_path / "out", "--samples-per-shard", "3", "--max-bad-fraction", "0.2")
    found = samples(tmp_path / "out")
    assert list(found) == [f"0000{shard}0000{i}" for shard in (0, 1) for i in range(3)] + ["0000200000"]
    sample = found["0000000002"]
    assert sample["jpg"] == (photos / "2.jpg").read_bytes()  # copied as it is
    assert sample["txt"] == b'a dog, 2 "quoted"'
    meta = json.loads(sample["json"])
    assert meta["captions"] == ['a dog, 2 "quoted"', "the same one"]
    assert (meta["width"], meta["height"], meta["key"], meta["source"]) == (12, 12, "0000000002", "2.jpg")
    samples_of = {name: entry.samples for name, entry in read_manifest(tmp_path / "out").items()}
    assert samples_of == {"00000.tar": 3, "00001.tar": 3, "00002.tar": 1}
    said = capsys.readouterr().out
    assert "1 x missing image" in said
    assert "none.jpg missing image" in said
    assert "3 shards, 7 samples" in said
    assert f"\ncoca-train experiment=pretrain_b32 data.shards={tmp_path}/out data.caption_keys=captions " in said
    assert all(
        check_shard(path).entry == read_manifest(path.parent)[path.name] for path in (tmp_path / "out").glob("*.tar")
    )


@pytest.mark.slow
def test_training_reads_what_was_prepared(photos, tmp_path):
    run(table(tmp_path / "t.csv", [(f"photos/{i}.jpg", f"a dog {i}") for i in range(7)]), tmp_path / "out")
    data = LAIONDataModule(
        str(tmp_path / "out"), None, tokenizer=TOKENIZER, batch_size=7, image_size=16, caption_keys="captions"
    )
    (batch,) = data.train_dataloader()
    assert sorted(int(key[-10:]) for key in batch.keys) == [100_000 * i for i in range(7)]  # a shard each


@pytest.mark.parametrize("kind", ["tsv", "parquet"])
def test_tables_with_columns_of_other_names(photos, tmp_path, kind):
    path = tmp_path / f"t.{kind}"
    if kind == "tsv":
        table(path, [("photos/1.jpg", "a dog")], head=("where", "says"))
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"where": ["photos/1.jpg"], "says": [["a dog", "number", None]]}), path)
    with pytest.raises(SystemExit, match=r"image, .*where, says.*--image"):
        run(path, tmp_path / "out")
    with pytest.raises(SystemExit, match=r"'nothing'.*where, says"):
        run(path, tmp_path / "out", "--image-column", "where", "--caption-column", "nothing")
    run(path, tmp_path / "out", "--image-column", "where", "--caption-column", "says")
    (sample,) = samples(tmp_path / "out").values()
    assert json.loads(sample["json"])["captions"] == (["a dog"] if kind == "tsv" else ["a dog", "number"])


def test_folder_of_images_and_texts(photos, tmp_path):
    (photos / "deep").mkdir()
    (photos / "0.jpg").rename(photos / "deep" / "0.jpg")
    for path in [*photos.rglob("*.*")]:
        path.with_suffix(".txt").write_text(f" it is {path.stem}\n")
    (photos / "6.txt").unlink()
    run(photos, tmp_path / "out", "--max-bad-fraction", "0.1", "--samples-per-shard", "100")
    found = samples(tmp_path / "out")
    assert [sample["txt"].decode() for sample in found.values()] == [f"it is {i}" for i in (*"12345", *"xxxx", 0)]
    suffixes = [next(iter(sample.keys() - {"txt", "json"})) for sample in found.values()]
    assert suffixes == [*["jpg"] * 5, "jpg", "jpg", "png", "webp", "jpg"]


ROWS = [{"file": f"{i}.jpg", "caption": f"{what} {i}"} for i in range(7) for what in ("a dog,", "number")]
TABLES = {
    "captions.jsonl": "\n".join(map(json.dumps, ROWS)),
    "captions.json": json.dumps(ROWS),
    "captions.csv": "\n".join(["file,caption", *(f'{row["file"]},"{row["caption"]}"' for row in ROWS)]),
    "captions.tsv": "\n".join(["file\tcaption", *(f"{row['file']}\t{row['caption']}" for row in ROWS)]),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_folder_with_a_table_is_read_as_a_training_on_it_reads_it(photos, tmp_path, name):
    (photos / name).write_text(TABLES[name])
    run(photos, tmp_path / "out")
    found = [json.loads(sample["json"]) for sample in samples(tmp_path / "out").values()]
    records = folder_records(photos, "train") + folder_records(photos, "val")
    assert {meta["source"]: tuple(meta["captions"]) for meta in found} == {r.id: r.captions for r in records}
    assert len(found) == 7


def test_a_folder_whose_table_names_splits(photos, tmp_path):
    rows = [(f"{i}.jpg", f"a dog {i}", "val" if i > 4 else "train") for i in range(7)]
    table(photos / "captions.csv", rows, head=("file", "caption", "split"))
    assert read_pairs(photos) == [Pair(photos / f"{i}.jpg", (f"a dog {i}",)) for i in range(5)]
    assert [pair.image.name for pair in read_pairs(photos, split="val")] == ["5.jpg", "6.jpg"]
    with pytest.raises(DataError, match=r"no split 'test', but train, val$"):
        read_pairs(photos, split="test")
    with pytest.raises(DataError, match=r"captions\.csv is read by its usual columns"):
        read_pairs(photos, caption_column="split")
    of_table = functools.partial(read_pairs, photos / "captions.csv")
    assert (of_table(), of_table(split="val")) == (read_pairs(photos), read_pairs(photos, split="val"))
    with pytest.raises(DataError, match=r"captions\.csv has no split 'test', but train, val$"):
        of_table(split="test")
    table(photos / "captions.csv", [*rows, ("0.jpg", "again", "test")], head=("file", "caption", "split"))
    with pytest.raises(DataError, match=r"0\.jpg into train and test"):
        of_table()


def test_empty_captions_of_a_known_folder_are_missing_ones(photos, tmp_path):
    images = [
        {"filename": f"{i}.jpg", "imgid": i, "split": "train", "sentences": [{"raw": raw} for raw in texts]}
        for i, texts in enumerate([["", " a  dog "], ["a dog"], [" "]])
    ]
    (photos / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    run(photos, tmp_path / "out", "--max-bad-fraction", "0.4")
    found = samples(tmp_path / "out").values()
    assert [(sample["txt"], json.loads(sample["json"])["captions"]) for sample in found] == [(b"a dog", ["a dog"])] * 2


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_is_read_by_its_own_separator(photos, tmp_path, separator):
    lines = [("image", "score", "caption"), ("photos/1.jpg", "0,5", "a dog, a cat")]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(lines)
    assert read_pairs(tmp_path / "t.csv") == [Pair(photos / "1.jpg", ("a dog, a cat",))]


def test_texts_are_in_utf_8(photos, tmp_path):
    (photos / "1.txt").write_bytes("Straße\n\nein  Haus\n".encode("utf-8-sig"))
    assert Pair(photos / "1.jpg", ("Straße", "ein Haus")) in read_pairs(photos)
    for content, said in (("café".encode("latin-1"), r"\(line 2\)"), (b"x" * 200_000, "field larger than")):
        (tmp_path / "t.csv").write_bytes(b"image,caption\nphotos/1.jpg," + content + b"\n")
        with pytest.raises(DataError, match=rf"t\.csv.*{said}") as caught:
            read_pairs(tmp_path / "t.csv")
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["coco", "karpathy", "flickr8k"])
def test_known_folders(tmp_path, format):
    write_data_set(format, tmp_path / "set", 24, 16)
    run(tmp_path / "set", tmp_path / "out")
    assert sum(entry.samples for entry in read_manifest(tmp_path / "out").values()) == 24
    assert {len(json.loads(sample["json"])["captions"]) for sample in samples(tmp_path / "out").values()} == {5}
    run(tmp_path / "set", tmp_path / "val", "--split", "val")
    assert sum(entry.samples for entry in read_manifest(tmp_path / "val").values()) == 3


def test_shards_of_img2dataset(tmp_path):
    (tmp_path / "raw").mkdir()
    for s in range(2):
        files = {k: v for i in range(5) for k, v in members(f"{s}{i:04d}", i).items()}
        files[f"{s}0001.json"] = json.dumps({"captions": ["number", " a dog number", None, "a\ncat"]}).encode()
        write_tar(tmp_path / "raw" / f"{s:05d}.tar", files | {f"{s}0003.jpg": b"junk", f"{s}0009.jpg": b"x"})
    (tmp_path / "raw" / "00000_stats.json").write_text("{}")
    run(tmp_path / "raw", tmp_path / "out", "--max-bad-fraction", "0.5")
    found = samples(tmp_path / "out")
    assert len(found) == 8
    meta = json.loads(found["0000100004"]["json"])
    assert (meta["key"], meta["source_key"], meta["recaption"], meta["caption"]) == (
        *("0000100004", "10004", "a dog", "a dog number"),
    )
    assert json.loads(found["0000000001"]["json"])["captions"] == ["a dog number", "number", "a cat"]


def test_json_of_a_stranger_does_not_grow_beyond_what_is_read(tmp_path):
    deep = '{"a":' + "[" * 900 + ",".join("0" * 100_000) + "]" * 900 + "}"  # 180 MB with an indent
    long = '{"a":[' + ",".join(["1e15"] * 200_000) + "]}"  # three times as long when it is written again
    files = members("1", 1) | members("2", 2) | {"1.json": deep.encode(), "2.json": long.encode()}
    written = prepare.write_shard(prepare.Task(0, write_tar(tmp_path / "raw.tar", files)), tmp_path / "out")
    assert written.entry.samples == 2
    assert read(tmp_path / "out" / written.name, "captions") == (["0000000000", "0000000001"], {})
    kept, left_out = (json.loads(sample["json"]) for sample in samples(tmp_path / "out").values())
    assert kept["a"]
    assert left_out.keys() == {"caption", "captions", "height", "key", "source_key", "width"}


@pytest.mark.slow
def test_equal_sources_give_equal_bytes_with_any_number_of_workers(photos, tmp_path):
    rows = [(f"photos/{i}.jpg", f"a dog {i}") for i in range(7)] + [("photos/x.bmp", "number")]
    source = table(tmp_path / "t.csv", rows)
    run(source, tmp_path / "a", "--samples-per-shard", "3")
    run(source, tmp_path / "b", "--samples-per-shard", "3", "--workers", "2")
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")


def killed_in_the_middle(source: Path, output: Path) -> None:
    """Dies while the third shard is written."""
    members = prepare._members

    def slow(key: str, *sample: Any) -> dict[str, Any]:
        if key == "0000200000":
            (output / "here").touch()
            time.sleep(60)
        return members(key, *sample)

    prepare._members = slow
    run(source, output, "--samples-per-shard", "2")


@pytest.mark.slow
def test_it_resumes_after_a_kill(photos, tmp_path, monkeypatch):
    source = table(tmp_path / "t.csv", [(f"photos/{i}.jpg", f"a dog {i}") for i in range(7)])
    run(source, tmp_path / "whole", "--samples-per-shard", "2")
    output = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=killed_in_the_middle, args=(source, output))
    process.start()
    while not (output / "here").exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (output / "here").unlink()
    assert {path.name for path in output.glob("*.tar")} == {"00000.tar", "00001.tar"}
    assert not (output / MANIFEST).exists()
    with (output / prepare.JOURNAL).open("a") as file:
        file.write('["00002.tar", [2')
    written = []
    real = prepare.write_shard
    monkeypatch.setattr(prepare, "write_shard", lambda task, folder: written.append(task.number) or real(task, folder))
    run(source, output, "--samples-per-shard", "2")
    assert written == [2, 3]
    assert shard_bytes(output) == shard_bytes(tmp_path / "whole")
    run(source, output, "--samples-per-shard", "2")
    assert written == [2, 3]


def test_files_that_could_not_be_read_are_read_later(photos, tmp_path, monkeypatch):
    """Of three shards one lacks a file for ever, one all files for now, and of one a read fails."""
    rows = [(f"photos/{i}.jpg", "a dog") for i in (0, 9, 1, 2, 3, 4)]
    source, more = table(tmp_path / "t.csv", rows), ("--samples-per-shard", "2", "--max-bad-fraction", "0.2")
    for i in (1, 2):
        (photos / f"{i}.jpg").rename(tmp_path / f"{i}.jpg")
    real, write = prepare.open_regular, prepare.write_shard

    def failing(path: Path) -> Any:
        if path.name == "4.jpg":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(prepare, "open_regular", failing)
    with pytest.raises(SystemExit, match=r"4 of 6 samples are bad"):
        run(source, tmp_path / "out", *more)
    monkeypatch.setattr(prepare, "open_regular", real)
    for i in (1, 2):
        (tmp_path / f"{i}.jpg").rename(photos / f"{i}.jpg")
    written = []
    monkeypatch.setattr(prepare, "write_shard", lambda task, folder: written.append(task.number) or write(task, folder))
    for _ in range(2):
        run(source, tmp_path / "out", *more)
        assert written == [1, 2]
        found = [json.loads(sample["json"])["source"] for sample in samples(tmp_path / "out").values()]
        assert found == [f"{i}.jpg" for i in range(5)]


def test_a_photo_that_was_repaired_is_taken_in(photos, tmp_path):
    rows, good = [(f"photos/{i}.jpg", "a dog") for i in range(6)], (photos / "4.jpg").read_bytes()
    source, more = table(tmp_path / "t.csv", rows), ("--samples-per-shard", "2", "--max-bad-fraction", "0.2")
    (photos / "4.jpg").write_bytes(good[:300])
    for _ in range(2):
        run(source, tmp_path / "out", *more)
        assert len(samples(tmp_path / "out")) == 5
    before = {key: sample["json"] for key, sample in samples(tmp_path / "out").items()}
    (photos / "4.jpg").write_bytes(good)
    os.utime(photos / "4.jpg", (86400, 86400))  # of the photo that a copy brings back
    run(source, tmp_path / "out", *more)
    found = {key: sample["json"] for key, sample in samples(tmp_path / "out").items()}
    assert len(found) == 6
    assert before.items() <= found.items()  # a selection that was made before names the same samples


def test_shards_of_photos_that_are_gone_are_kept(photos, tmp_path):
    rows = [(f"photos/{i}.jpg", "a dog") for i in range(3)] + [("x" * 300, "no path"), ("photos/3.jpg", "a dog")]
    source, output = table(tmp_path / "t.csv", rows), tmp_path / "out"
    run(source, output, "--samples-per-shard", "2", "--max-bad-fraction", "0.3")
    first = (output / "00001.tar").read_bytes()
    (photos / "2.jpg").write_bytes((photos / "3.jpg").read_bytes())
    run(source, output, "--samples-per-shard", "2", "--max-bad-fraction", "0.3")
    assert (output / "00001.tar").read_bytes() != first  # also beside what is no path
    before = {path.name: path.read_bytes() for path in output.glob("*.tar")}
    (photos / "0.jpg").unlink()
    run(source, output, "--samples-per-shard", "2", "--max-bad-fraction", "0.3")
    photos.rename(tmp_path / "elsewhere")
    run(source, output, "--samples-per-shard", "2", "--max-bad-fraction", "0.3")
    assert {path.name: path.read_bytes() for path in output.glob("*.tar")} == before
    assert len(samples(output)) == 4


def test_files_are_for_all_who_may_read_the_folder(photos, tmp_path, capsys):
    before = os.umask(0o022)
    try:
        run(table(tmp_path / "t.csv", [("photos/1.jpg", "a")]), tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}
    assert "data.caption_keys" not in capsys.readouterr().out  # of one caption each


def test_mistakes_are_one_sentence(photos, tmp_path):
    source = table(tmp_path / "t.csv", [(f"photos/{i}.jpg", f"a dog {i}") for i in range(7)])
    with pytest.raises(SystemExit, match="no file or folder"):
        run(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(SystemExit, match=r"photos is not empty"):
        run(source, photos)
    for place in (source, source / "out"):
        with pytest.raises(SystemExit, match=r"cannot write .*t\.csv"):
            run(source, place)
    run(source, tmp_path / "out")
    with pytest.raises(SystemExit, match=r"another source"):
        run(source, tmp_path / "out", "--samples-per-shard", "2")
    (tmp_path / "void").mkdir()
    with pytest.raises(SystemExit, match=r"void.*\.csv"):
        run(tmp_path / "void", tmp_path / "out2")
    (photos / "3.jpg").write_bytes(b"junk")
    with pytest.raises(SystemExit, match=r"1 of 7.*--max-bad-fraction 0\.05"):
        run(source, tmp_path / "bad")
    assert not (tmp_path / "bad" / MANIFEST).exists()
    assert len([*(tmp_path / "bad").glob("*.tar")]) == 6
    (tmp_path / "t.txt").touch()
    with pytest.raises(SystemExit, match=r"t\.txt.*\.parquet"):
        run(tmp_path / "t.txt", tmp_path / "out2")
    write_tar(tmp_path / "void" / "0.tar", members("1", 1))
    for words in (("--caption-column", "alt"), ("--split", "test"), ("--samples-per-shard", "5")):
        with pytest.raises(SystemExit, match="are for tables and folders"):
            run(tmp_path / "void", tmp_path / "out2", *words)
