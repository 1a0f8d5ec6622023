"""Reading annotation files and image folders as users have them: complete, nearly complete, misplaced or malformed."""

import gzip
import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from coca_lit.data.datasets.captions import flickr_records, mscoco_records, nocaps_records
from coca_lit.data.records import ImageFile, trainable
from coca_lit.errors import DataError, DataNotFoundError
from helpers.scene_files import write_json


def write_images(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 6), (200, 10, 10)).save(folder / name)


def karpathy_image(i: int, filename: str, split: str, **more: object) -> dict:
    sentences = [{"tokens": ["a", "dog"], "raw": f" A dog {i}.\n", "imgid": i, "sentid": 2 * i}]
    return {"filename": filename, "imgid": i, "split": split, "sentids": [2 * i], "sentences": sentences, **more}


def coco_content(names: dict[int, str], **more: object) -> dict:
    """Image `i` has the captions "i first" and "i second", the latter with blanks and a newline around it."""
    return {
        "images": [{"id": i, "file_name": name, **more} for i, name in names.items()],
        "annotations": [{"image_id": i, "id": 9 * i, "caption": text} for i in names for text in (f"{i} first",)]
        + [{"image_id": i, "id": 9 * i + 1, "caption": f"  {i} second\n"} for i in names],
    }


@pytest.fixture
def flickr(tmp_path: Path) -> Path:
    names = [f"{i}.jpg" for i in range(200)]
    write_images(tmp_path / "images", names)
    images = [karpathy_image(i, name, "train" if i < 150 else "val") for i, name in enumerate(names)]
    write_json(tmp_path / "dataset_flickr8k.json", {"images": images, "dataset": "flickr8k"})
    return tmp_path


def test_an_image_file_is_rgb_and_a_broken_one_is_named(tmp_path):
    Image.new("L", (4, 3), 7).save(tmp_path / "grey.png")
    assert ImageFile(tmp_path / "grey.png")().mode == "RGB"
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        ImageFile(tmp_path / "broken.jpg")()


def test_flickr_records(flickr):
    records = flickr_records(flickr, "val")
    assert [record.id for record in records] == list(range(150, 200))
    assert records[0].captions == ("A dog 150.",)
    assert pickle.loads(pickle.dumps(records[0])).image().size == (8, 6)


@pytest.mark.parametrize("folder", ["Flicker8k_Dataset", "."])
def test_flickr_folder_names(flickr, folder):
    if folder == ".":
        for path in (flickr / "images").iterdir():
            path.rename(flickr / path.name)
    else:
        (flickr / "images").rename(flickr / folder)
    assert len(flickr_records(flickr, "train")) == 150


def test_a_known_absent_image_is_skipped_but_many_are_an_error(flickr, caplog):
    (flickr / "images/3.jpg").unlink()
    assert len(flickr_records(flickr, "train")) == 149
    assert "skipped 1 of 150 images without a file, e.g. 3.jpg" in caplog.text
    (flickr / "images/4.jpg").unlink()
    with pytest.raises(DataNotFoundError, match=r"2 of 150 .*dataset_flickr8k\.json.* 3\.jpg"):
        flickr_records(flickr, "train")


def test_a_name_in_a_warning_is_printable(flickr, caplog):
    path = flickr / "dataset_flickr8k.json"
    path.write_text(path.read_text().replace('"3.jpg"', '"3\\u202e.jpg"'))
    assert len(flickr_records(flickr, "train")) == 149
    assert r"e.g. 3\u202e.jpg" in caplog.text


def test_missing_data_say_what_where_and_how(tmp_path):
    where = tmp_path / "dataset_flickr30k.json"
    with pytest.raises(DataNotFoundError, match=rf"^the captions of flickr30k .*{where}.*Karpathy's .*images/.*$"):
        flickr_records(tmp_path, "train", "flickr30k")


def test_malformed_annotations_are_one_sentence(flickr):
    path = flickr / "dataset_flickr8k.json"
    with pytest.raises(DataError, match=r"'test'.* train, val"):
        flickr_records(flickr, "test")
    write_json(path, {"images": [{"filename": "1.jpg", "split": "train", "imgid": 1}]})
    with pytest.raises(DataError, match="'sentences'"):
        flickr_records(flickr, "train")
    write_json(path, [1, 2])
    with pytest.raises(DataError, match="does not follow Karpathy's schema"):
        flickr_records(flickr, "train")
    path.write_text('{"images": [')
    with pytest.raises(DataError, match=r"dataset_flickr8k\.json"):
        flickr_records(flickr, "train")


@pytest.fixture
def karpathy_coco(tmp_path: Path) -> Path:
    rows = [("train2014", "train"), ("val2014", "restval"), ("val2014", "val"), ("val2014", "test")]
    images = []
    for i, (folder, split) in enumerate(rows, start=10):
        name = f"COCO_{folder}_{i:012d}.jpg"
        write_images(tmp_path / folder, [name])
        images.append(karpathy_image(i - 10, name, split, filepath=folder, cocoid=i))
    write_json(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    return tmp_path


def test_karpathy_coco_train_includes_restval_and_ids_are_coco_ids(karpathy_coco):
    ids = {split: [record.id for record in mscoco_records(karpathy_coco, split)] for split in ("train", "val", "test")}
    assert ids == {"train": [10, 11], "val": [12], "test": [13]}


@pytest.mark.parametrize(
    ("year", "folder", "name"),
    [
        (2017, "val2017", "000000000042.jpg"),
        (2014, "val2014", "COCO_val2014_000000000042.jpg"),
        (2017, "images/val2017", "000000000042.jpg"),
    ],
)
def test_coco_layouts(tmp_path, year, folder, name):
    write_images(tmp_path / folder, [name])
    write_json(tmp_path / f"annotations/captions_val{year}.json", coco_content({42: name}))
    (record,) = mscoco_records(tmp_path, "val")
    assert (record.id, record.captions) == (42, ("42 first", "42 second"))
    with pytest.raises(DataNotFoundError, match="alone has a public test set"):
        mscoco_records(tmp_path, "test")
    with pytest.raises(DataNotFoundError, match=r"captions_train2017\.json"):
        mscoco_records(tmp_path, "train")


def test_empty_captions_are_references_but_nothing_to_train_on(tmp_path):
    """As `coca-score` counts them: CIDEr is a mean over references."""
    write_images(tmp_path / "val2017", ["1.jpg", "2.jpg"])
    content = coco_content({1: "1.jpg", 2: "2.jpg"})
    content["annotations"] = [{"image_id": i, "caption": text} for i, text in ((1, "a dog\n"), (1, " "), (2, ""))]
    write_json(tmp_path / "annotations/captions_val2017.json", content)
    records = mscoco_records(tmp_path, "val")
    assert [record.captions for record in records] == [("a dog", ""), ("",)]
    assert [(record.id, record.captions) for record in trainable(records)] == [(1, ("a dog",))]


@pytest.mark.parametrize("name", ["nocaps_val_4500_captions.json", "nocaps_val_captions.json.gz"])
@pytest.mark.parametrize("folder", ["val", "."])
def test_nocaps_layouts(tmp_path, name, folder):
    write_images(tmp_path / folder, ["0013.jpg"])
    text = json.dumps(coco_content({0: "0013.jpg"}, domain="near-domain"))
    data = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
    (tmp_path / name).write_bytes(data)
    (record,) = nocaps_records(tmp_path)
    assert (record.id, record.domain, len(record.captions)) == (0, "near-domain", 2)
