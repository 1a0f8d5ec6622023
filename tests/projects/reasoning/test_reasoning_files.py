"""SNLI-VE, NLVR2 and one's own texts with labels, from files in their layouts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coca_lit.data.records import Record
from coca_lit.data.scenes.render import scene_records
from coca_lit.errors import DataError
from coca_lit.projects.reasoning.scene_statements import comparison_records, entailment_records
from coca_lit.projects.reasoning.statement_files import (
    nlvr2_records,
    nlvr2_statement,
    pair_labels,
    pairs_records,
    snli_ve_records,
)
from coca_lit.projects.reasoning.vqa_files import vqa_records
from coca_lit.tools.prepare.scenes import export_scenes
from helpers.fuzzing import bounded, forged, fuzz
from helpers.shards import jpeg


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    for name in ("snli_ve", "nlvr2", "pairs"):
        export_scenes(name, root / name, count=40, size=32)
    return root


def test_snli_ve(files: Path) -> None:
    compare(lambda split: snli_ve_records(files / "snli_ve", split), entailment_records, str)


def test_nlvr2(files: Path) -> None:
    compare(lambda split: nlvr2_records(files / "nlvr2", split), comparison_records, str.capitalize)
    for line in (files / "nlvr2" / "data" / "train.json").read_text().splitlines():
        row = json.loads(line)
        image = f"{row['identifier'].rpartition('-')[0]}-img0.png"
        assert (files / "nlvr2" / "images" / "train" / str(row["directory"]) / image).is_file()


def test_pairs(files: Path) -> None:
    records = compare(lambda split: pairs_records(files / "pairs", split), comparison_records, str, ("train", "val"))
    assert {record.domain for record in records} == {"more", "both", "one"}
    assert sorted(pair_labels(files / "pairs")) == ["false", "true"]


def compare(read: Callable, made: Callable, label: Callable, splits: Any = ("train", "val", "test")) -> list[Record]:
    """With the scenes that the files were written from."""
    for split in splits:
        records, scenes = read(split), made(split, size=32, count=40 if split == "train" else 5)
        assert len(records) == len(scenes)
        assert len({record.id for record in records}) == len(records)
        for record, scene in zip(records, scenes, strict=True):
            assert (record.question, record.captions) == (scene.question, (label(scene.captions[0]),))
            for one, other in zip(record.images, scene.images, strict=True):
                far = np.abs(np.asarray(one()).astype(int) - np.asarray(other()).astype(int))
                assert far.mean() < 4  # JPEG
    return records


def test_texts_of_one_image_share_it(files: Path) -> None:
    """Intervals draw images."""
    for records in (snli_ve_records(files / "snli_ve", "val"), nlvr2_records(files / "nlvr2", "val")):
        images = {record.image for record in records}
        assert 1 < len(images) < len(records)


def test_a_statement_of_nlvr2_is_its_set_and_text() -> None:
    ids = ["dev-850-0-1", "dev-850-1-1", "dev-850-0-0", "dev-851-0-1"]
    found = [nlvr2_statement(Record(id, lambda: None)) for id in ids]  # type: ignore[arg-type, return-value]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_texts_without_a_label_are_left_out(files: Path, tmp_path: Path) -> None:
    rows = (files / "snli_ve" / "snli_ve_dev.jsonl").read_text().splitlines()
    unsure = json.loads(rows[0]) | {"gold_label": "-"}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "snli_ve_dev.jsonl").write_text("\n".join([json.dumps(unsure), *rows[1:]]))
    assert len(snli_ve_records(tmp_path, "val", files / "snli_ve" / "flickr30k_images")) == len(rows) - 1


def test_pairs_without_splits_hold_out_photos_and_not_texts(files: Path, tmp_path: Path) -> None:
    photos = sorted((files / "snli_ve" / "flickr30k_images").iterdir())[:40]
    (tmp_path / "images").mkdir()
    lines = ["file;text;label"]
    for photo in photos:
        (tmp_path / "images" / photo.name).write_bytes(photo.read_bytes())
        lines += [f"{photo.name};text {i};{i % 2}" for i in range(3)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    train, val = pairs_records(tmp_path, "train"), pairs_records(tmp_path, "val")
    assert len(train) + len(val) == 120
    assert len(val) == 12
    assert not {record.image for record in train} & {record.image for record in val}
    assert pair_labels(tmp_path) == ["0", "1"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("", "holds no rows"),
        ("image,text\na.png,b", "no column of the usual names .*label"),
        ("image,text,label\na.png,,x", "row 1 has '' as text"),
        ("image,text,label,split\na.png,b,x,dev2", "split 'dev2'"),
        ("image,image2,text,label\na.png,a.png,b,x", "add a column split"),
        ("image,text,label\n../a.png,b,x", "not relative to the folder"),
        ("image,text,label\nb.png,b,x", "1 of 1 photos"),
        ("image,text,label,split\na.png,b,x,train", "no split 'val', but train"),
    ],
)
def test_tables_that_cannot_be_used(rows: str, said: str, files: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(rows)
    (tmp_path / "a.png").write_bytes(next((files / "pairs" / "images").iterdir()).read_bytes())
    with pytest.raises(DataError, match=said):
        pairs_records(tmp_path, "val")


def test_splits_and_labels_that_are_none(tmp_path: Path) -> None:
    for read in (snli_ve_records, nlvr2_records):
        with pytest.raises(DataError, match="train, val, test"):
            read(tmp_path, "dev")
    (tmp_path / "pairs.csv").write_text("image,text,label\na.png,b,x")
    with pytest.raises(DataError, match="1 different labels"):
        pair_labels(tmp_path)


def test_a_broken_photo_is_not_scored(tmp_path: Path) -> None:
    write_photos(tmp_path)
    (tmp_path / "1.jpg").write_bytes((tmp_path / "1.jpg").read_bytes()[:100])
    rows = "\n".join(f"{i}.jpg,{'val' if i < 5 else 'train'},a photo,{i % 2}" for i in range(10))
    (tmp_path / "pairs.csv").write_text(f"image,split,text,label\n{rows}")
    assert len(pairs_records(tmp_path, "val")) == 4


def write_photos(folder: Path) -> None:
    for i, record in enumerate(scene_records("val", size=32, count=10)):
        record.image().save(folder / f"{i}.jpg")


# Files of strangers


QUESTIONS = {"data_subtype": "val2014", "questions": [{"image_id": 1, "question": "what?", "question_id": 10}]}
ANSWERS = {
    "annotations": [
        {
            "question_id": 10,
            "multiple_choice_answer": "dog",
            "answers": [{"answer": "dog"}, {"answer": "cat"}],
            "answer_type": "yes/no",
        }
    ]
}


@pytest.mark.slow
@fuzz
@given(st.data())
def test_forged_questions_and_answers(forged_files, data):
    (forged_files / "images").mkdir(exist_ok=True)
    for kind, document in (("OpenEnded_mscoco_val2014_questions", QUESTIONS), ("mscoco_val2014_annotations", ANSWERS)):
        (forged_files / f"v2_{kind}.json").write_bytes(data.draw(forged(document)))
    (forged_files / "images" / "COCO_val2014_000000000001.jpg").touch()
    with bounded():
        for record in vqa_records(forged_files, "val"):
            hash(record.id)


HYPOTHESIS = {"gold_label": "neutral", "Flickr30K_ID": "0", "pairID": "0.jpg#0r1n", "sentence2": "a dog"}
STATEMENT = {"identifier": "dev-0-0-0", "sentence": "two dogs", "label": "True", "left_url": "", "right_url": ""}
LABELLED = {"image": "0.jpg", "image2": "1.png", "text": "a dog", "label": "yes", "split": "train", "kind": "dogs"}


@pytest.mark.slow
@fuzz
@given(st.data())
def test_forged_statements(forged_files, data):
    (forged_files / "images").mkdir(exist_ok=True)
    for name in ("0.jpg", "1.jpg", "0.png", "1.png", "dev-0-0-img0.png", "dev-0-0-img1.png"):
        (forged_files / "images" / name).write_bytes(jpeg(3))
    for name, document, reader in (
        ("snli_ve_dev.jsonl", HYPOTHESIS, lambda: snli_ve_records(forged_files, "val", forged_files / "images")),
        ("dev.json", STATEMENT, lambda: nlvr2_records(forged_files, "val")),
        ("pairs.jsonl", LABELLED, lambda: [pairs_records(forged_files, "train"), pair_labels(forged_files)]),
    ):
        (forged_files / name).write_bytes(data.draw(forged(document)))
        with bounded():
            reader()
