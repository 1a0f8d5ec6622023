"""Long captions in the layouts of Urban1k, DOCCI and ShareGPT4V."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coca_lit.data.records import Record
from coca_lit.errors import DataError, DataNotFoundError
from coca_lit.projects.retrieval_sets.long_captions import docci_records, sharegpt4v_records, urban1k_records
from coca_lit.projects.retrieval_sets.positives import eccv_positives
from helpers.evaluating import WORDS, noise
from helpers.fuzzing import bounded, forged, fuzz
from helpers.shards import jpeg

TEXTS = [" ".join([word] * count) for word, count in zip(WORDS, (3, 22, 23, 40), strict=False)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("long")
    for folder in ("image", "caption", "images", "sam/images", "coco/train2017"):
        (root / folder).mkdir(parents=True)
    docci, share = [], []
    for i, text in enumerate(TEXTS):
        noise(i).save(root / "image" / f"{i}.jpg")
        (root / "caption" / f"{i}.txt").write_text(f"{text}\nsecond line\n")
        noise(i).save(root / "images" / f"test_{i}.jpg")
        about = {"example_id": f"test_{i}", "image_file": f"test_{i}.jpg", "description": text}
        docci += [{"type": "docci", "split": "test", **about}, {**about, "split": "train"}]
        folder = ("sam/images", "coco/train2017")[i % 2]
        noise(i).save(root / folder / f"{i}.jpg")
        talk = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": text}]
        share.append({"id": str(i), "image": f"{folder}/{i}.jpg", "conversations": talk})
    (root / "docci_descriptions.jsonlines").write_text("\n".join(map(json.dumps, docci)))
    (root / "share-captioner_coco_lcs_sam_1246k_1107.json").write_text(json.dumps(share, indent=1))
    return root


@pytest.mark.parametrize("read", [urban1k_records, docci_records, sharegpt4v_records])
def test_layouts(root: Path, read) -> None:
    records = read(root)
    assert [record.captions for record in records] == [(text,) for text in TEXTS]
    assert all(record.image().size == (48, 40) for record in records)


def test_the_first_entries_of_a_list_that_goes_on(root: Path, tmp_path: Path) -> None:
    whole = (root / "share-captioner_coco_lcs_sam_1246k_1107.json").read_text()
    (root / "torn.json").write_text(whole[:-20])
    assert len(sharegpt4v_records(root, "torn.json", count=2)) == 2
    with pytest.raises(DataError, match="not a readable JSON file"):
        sharegpt4v_records(root, "torn.json")
    (root / "out.json").write_text(json.dumps([{"image": "../x.jpg", "conversations": []}]))
    with pytest.raises(DataError, match="out of the folder"):
        sharegpt4v_records(root, "out.json")
    talk = [{"value": "What?"}, {"value": "a dog"}]
    named = [{"image": f"{name}.jpg", "conversations": talk} for name in ("x/1", "y/1", "x/9")]
    (root / "twice.json").write_text(json.dumps(named))
    with pytest.raises(DataError, match=r"twice\.json.*1\.jpg"):
        sharegpt4v_records(root, "twice.json")
    with pytest.raises(DataError, match="val"):
        docci_records(root, "val")
    for read in (urban1k_records, docci_records, sharegpt4v_records):
        with pytest.raises(DataNotFoundError, match=str(tmp_path)):
            read(tmp_path)


# Files of strangers


TALK = [{"value": "?"}, {"value": "a dog"}]
NUMBERED = {"images": [{"cocoid": 1, "imgid": 0, "split": "test", "sentences": [{"sentid": 7}]}]}
TALKS = [{"image": f"images/{i}.jpg", "conversations": [{"value": "?"}, {"value": "a dog"}]} for i in range(2)]
DOCCI = {"example_id": "0", "image_file": "0.jpg", "description": "a dog", "split": "test"}


def share(root: Path) -> list[Record]:
    return sharegpt4v_records(root, "list.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("read", "name", "content", "said"),
    [
        (docci_records, "docci_descriptions.jsonlines", {"split": "test", "example_id": 1.5}, "'image_file'"),
        (share, "list.json", [{"image": "/etc/a.jpg", "conversations": TALK}], "leads out of the folder"),
        (share, "list.json", [{"image": "a.jpg", "conversations": []}], "ShareGPT4V's schema"),
        (share, "list.json", b"[" * 100_000, "not a readable JSON file"),
        (share, "list.json", b"{}", "it holds no list"),
    ],
)
def test_long_captions_of_strangers(tmp_path, read, name, content, said):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(jpeg())
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(DataError, match=said):
        read(tmp_path)


@pytest.mark.slow
def test_a_caption_that_is_a_fifo_does_not_block(tmp_path):
    (tmp_path / "caption").mkdir()
    os.mkfifo(tmp_path / "caption" / "1.txt")
    with pytest.raises(DataError, match="not a regular file"):
        urban1k_records(tmp_path)


@pytest.mark.slow
@fuzz
@given(st.data())
def test_forged_files_of_retrieval(forged_files, data):
    (forged_files / "images").mkdir(exist_ok=True)
    for name in ("0.jpg", "1.jpg"):
        (forged_files / "images" / name).write_bytes(jpeg(3))
    (forged_files / "dataset_coco.json").write_text(json.dumps(NUMBERED))
    (forged_files / "eccv_image_to_caption.json").write_text("{}")
    for name, document, reader in (
        ("eccv_caption_to_image.json", {"1": [2]}, lambda: eccv_positives(forged_files, forged_files)),
        ("dataset_coco.json", NUMBERED, lambda: eccv_positives(forged_files, forged_files)),
        ("docci_descriptions.jsonlines", DOCCI, lambda: docci_records(forged_files)),
        ("list.json", TALKS, lambda: sharegpt4v_records(forged_files, "list.json")),
    ):
        (forged_files / name).write_bytes(data.draw(forged(document)))
        with bounded():
            reader()
