"""Long captions in the layouts of Urban1k, DOCCI and ShareGPT4V."""

import json
from pathlib import Path

import pytest

from coca_lit.errors import DataError, DataNotFoundError
from coca_lit.projects.retrieval_sets.long_captions import docci_records, sharegpt4v_records, urban1k_records
from helpers.evaluating import WORDS, noise

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
