"""Files of long captions and of right answers that a stranger has written are refused in one sentence."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coca_lit.data.records import Record
from coca_lit.errors import DataError
from coca_lit.projects.retrieval_sets.long_captions import docci_records, sharegpt4v_records, urban1k_records
from coca_lit.projects.retrieval_sets.positives import eccv_positives
from helpers.fuzzing import bounded, forged, fuzz
from helpers.shards import jpeg

pytestmark = pytest.mark.slow

TALK = [{"value": "?"}, {"value": "a dog"}]
NUMBERED = {"images": [{"cocoid": 1, "imgid": 0, "split": "test", "sentences": [{"sentid": 7}]}]}
TALKS = [{"image": f"images/{i}.jpg", "conversations": [{"value": "?"}, {"value": "a dog"}]} for i in range(2)]
DOCCI = {"example_id": "0", "image_file": "0.jpg", "description": "a dog", "split": "test"}


def share(root: Path) -> list[Record]:
    return sharegpt4v_records(root, "list.json")


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


def test_a_caption_that_is_a_fifo_does_not_block(tmp_path):
    (tmp_path / "caption").mkdir()
    os.mkfifo(tmp_path / "caption" / "1.txt")
    with pytest.raises(DataError, match="not a regular file"):
        urban1k_records(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzz
@given(st.data())
def test_forged_files_of_retrieval(folder, data):
    (folder / "images").mkdir(exist_ok=True)
    for name in ("0.jpg", "1.jpg"):
        (folder / "images" / name).write_bytes(jpeg(3))
    (folder / "dataset_coco.json").write_text(json.dumps(NUMBERED))
    (folder / "eccv_image_to_caption.json").write_text("{}")
    for name, document, reader in (
        ("eccv_caption_to_image.json", {"1": [2]}, lambda: eccv_positives(folder, folder)),
        ("dataset_coco.json", NUMBERED, lambda: eccv_positives(folder, folder)),
        ("docci_descriptions.jsonlines", DOCCI, lambda: docci_records(folder)),
        ("list.json", TALKS, lambda: sharegpt4v_records(folder, "list.json")),
    ):
        (folder / name).write_bytes(data.draw(forged(document)))
        with bounded():
            reader()
