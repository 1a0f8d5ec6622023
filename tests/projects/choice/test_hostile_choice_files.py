"""Files of SugarCrepe, Winoground and CHAIR that a stranger has written are refused in one sentence."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coca_lit.errors import DataError
from coca_lit.projects.choice.chair import Chair
from coca_lit.projects.choice.files import (
    SUGARCREPE,
    SUGARCREPE_PP,
    sugarcrepe_pp_records,
    sugarcrepe_records,
    winoground_records,
)
from helpers.fuzzing import bounded, damaged, forged, fuzz
from helpers.shards import jpeg

pytestmark = pytest.mark.slow

WRONG_CAPTION = {"filename": "a.jpg", "caption": 1, "negative_caption": "b"}
WINO = {"id": 0, "image_0": "a", "image_1": "b", "caption_0": "a b", "caption_1": "b a"}


def objects(root: Path) -> Chair:
    return Chair(root / "synonyms.txt", root / "instances.json")


@pytest.mark.parametrize(
    ("read", "name", "content", "said"),
    [
        (sugarcrepe_records, "add_obj.json", [], "it holds a list, not an object"),
        (sugarcrepe_records, "add_obj.json", {"0": {"filename": "a.jpg", "caption": "a"}}, "'negative_caption'"),
        (sugarcrepe_records, "add_obj.json", {"0": WRONG_CAPTION}, "text"),
        (sugarcrepe_pp_records, "replace_obj.json", {}, "it holds an object, not a list"),
        (sugarcrepe_pp_records, "replace_obj.json", [[]], "a list stands where an object belongs"),
        (sugarcrepe_pp_records, "replace_obj.json", [{"caption": "a", "caption2": "b"}], "'negative_caption' is miss"),
        (winoground_records, "examples.jsonl", b"{\n", "line 1 of .* is not a readable JSON file"),
        (winoground_records, "examples.jsonl", b"[" * 100_000, "recursion depth|Stack overflow"),
        (winoground_records, "examples.jsonl", WINO | {"image_0": "../a"}, "images .*not found|lists, e.g."),
        (winoground_records, "examples.jsonl", WINO | {"caption_1": ["x"]}, "expected a text"),
        (objects, "synonyms.txt", b"\xff\xfe", "cannot be read"),
        (objects, "synonyms.txt", b"a," * 2**20, "a line for each object"),
        (objects, "instances.json", {"categories": [{"id": 1, "name": ["dog"]}]}, "COCO's instances schema"),
        (objects, "instances.json", {"categories": [], "annotations": [{"image_id": 1.5}]}, "an id, a text"),
    ],
)
def test_annotations_of_choices(tmp_path, read, name, content, said):
    (tmp_path / "synonyms.txt").write_text("dog, puppy\n")
    (tmp_path / "instances.json").write_text("{}")
    for kind in SUGARCREPE:
        (tmp_path / f"{kind}.json").write_text("{}")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(jpeg())
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(DataError, match=said):
        read(tmp_path)


PAIR = {"id": 0, "image_0": "0", "image_1": "1", "caption_0": "a dog", "caption_1": "dog a"}
INSTANCES = {"categories": [{"id": 1, "name": "dog"}], "annotations": [{"image_id": 0, "category_id": 1}]}


@fuzz
@given(st.data())
def test_forged_annotations_of_choices(forged_files, data):
    (forged_files / "images").mkdir(exist_ok=True)
    for name in ("0.jpg", "1.jpg", "0.png", "1.png"):
        (forged_files / "images" / name).write_bytes(jpeg(3))
    for kind in SUGARCREPE:
        (forged_files / f"{kind}.json").write_text("{}")
    for kind in SUGARCREPE_PP:
        (forged_files / "pp" / f"{kind}.json").parent.mkdir(exist_ok=True)
        (forged_files / "pp" / f"{kind}.json").write_text("[]")
    texts = {"caption": "a", "caption2": "b", "negative_caption": "c"}
    crepe_pp = [{"id": i, "filename": f"{i}.jpg", **texts} for i in range(2)]
    crepe = {str(i): {"filename": f"{i}.jpg", "caption": "a", "negative_caption": "b"} for i in range(2)}
    (forged_files / "synonyms.txt").write_bytes(data.draw(damaged(b"dog, puppy\ncat\n")))
    for name, document, reader in (
        ("add_obj.json", crepe, lambda: sugarcrepe_records(forged_files, forged_files / "images")),
        ("pp/swap_obj.json", crepe_pp, lambda: sugarcrepe_pp_records(forged_files / "pp", forged_files / "images")),
        ("examples.jsonl", PAIR, lambda: winoground_records(forged_files)),
        ("instances.json", INSTANCES, lambda: [Chair(forged_files / "synonyms.txt", forged_files / "instances.json")]),
    ):
        (forged_files / name).write_bytes(data.draw(forged(document)))
        with bounded():
            reader()
