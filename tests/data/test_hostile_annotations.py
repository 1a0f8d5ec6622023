"""Annotations that a stranger has written are refused in one sentence."""

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coca_lit.data.datasets.annotations import read_karpathy, read_references, read_results
from coca_lit.data.datasets.captions import coco_folder_records
from coca_lit.data.datasets.choice import (
    SUGARCREPE,
    SUGARCREPE_PP,
    sugarcrepe_pp_records,
    sugarcrepe_records,
    winoground_records,
)
from coca_lit.data.datasets.classification import _read_classes
from coca_lit.data.datasets.retrieval import docci_records, eccv_positives, sharegpt4v_records, urban1k_records
from coca_lit.data.datasets.statements import nlvr2_records, pair_labels, pairs_records, snli_ve_records
from coca_lit.data.datasets.vqa import vqa_records
from coca_lit.data.records import Record
from coca_lit.data.text_batches import read_texts
from coca_lit.errors import DataError
from coca_lit.evals.chair import Chair
from helpers.fuzzing import bounded, damaged, forged, fuzz
from helpers.shards import jpeg

pytestmark = pytest.mark.slow

WINO = {"id": 0, "image_0": "a", "image_1": "b", "caption_0": "a b", "caption_1": "b a"}
TALK = [{"value": "?"}, {"value": "a dog"}]


def share(root: Path) -> list[Record]:
    return sharegpt4v_records(root, "list.json")


def objects(root: Path) -> Chair:
    return Chair(root / "synonyms.txt", root / "instances.json")


@pytest.mark.parametrize(
    ("read", "name", "content", "said"),
    [
        (sugarcrepe_records, "add_obj.json", [], "it holds a list, not an object"),
        (
            sugarcrepe_records,
            "add_obj.json",
            {"0": {"filename": "a.jpg", "caption": 1, "negative_caption": "b"}},
            "text",
        ),
        (
            sugarcrepe_records,
            "add_obj.json",
            {"0": {"filename": "a.jpg", "caption": "a"}},
            "'negative_caption' is miss",
        ),
        (sugarcrepe_pp_records, "replace_obj.json", {}, "it holds an object, not a list"),
        (sugarcrepe_pp_records, "replace_obj.json", [[]], "a list stands where an object belongs"),
        (sugarcrepe_pp_records, "replace_obj.json", [{"caption": "a", "caption2": "b"}], "'negative_caption' is miss"),
        (winoground_records, "examples.jsonl", b"{\n", "line 1 of .* is not a readable JSON file"),
        (winoground_records, "examples.jsonl", b"[" * 100_000, "nested too deeply"),
        (winoground_records, "examples.jsonl", WINO | {"image_0": "../a"}, "images .*not found|lists, e.g."),
        (winoground_records, "examples.jsonl", WINO | {"caption_1": ["x"]}, "expected a text"),
        (
            docci_records,
            "docci_descriptions.jsonlines",
            {"split": "test", "example_id": 1.5},
            "'image_file' is missing",
        ),
        (share, "list.json", [{"image": "/etc/a.jpg", "conversations": TALK}], "leads out of the folder"),
        (share, "list.json", [{"image": "../a.jpg", "conversations": TALK}], "leads out of the folder"),
        (share, "list.json", [{"image": "a.jpg", "conversations": 7}], "ShareGPT4V's schema"),
        (share, "list.json", [{"image": "a.jpg", "conversations": []}], "ShareGPT4V's schema"),
        (share, "list.json", b"[" * 100_000, "not a readable JSON file"),
        (share, "list.json", b"{}", "it holds no list"),
        (objects, "synonyms.txt", b"\xff\xfe", "cannot be read"),
        (objects, "synonyms.txt", b"a," * 2**20, "a line for each object"),
        (objects, "instances.json", {"categories": [{"id": 1, "name": ["dog"]}]}, "COCO's instances schema"),
        (objects, "instances.json", {"categories": [], "annotations": [{"image_id": 1.5}]}, "an id, a text"),
    ],
)
def test_annotations_of_evaluations(tmp_path, read, name, content, said):
    (tmp_path / "synonyms.txt").write_text("dog, puppy\n")
    (tmp_path / "instances.json").write_text("{}")
    for kind in SUGARCREPE:
        (tmp_path / f"{kind}.json").write_text("{}")
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


def test_a_list_of_captions(tmp_path):
    (tmp_path / "captions.json").write_text("[]")
    with pytest.raises(DataError, match=r"captions\.json.*COCO captions.* list") as caught:
        coco_folder_records(tmp_path)
    assert "indices" not in str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


KARPATHY = {
    "images": [
        {"filename": f"{i}.jpg", "split": split, "imgid": i, "cocoid": 10 + i, "sentences": [{"raw": "a dog"}]}
        for i, split in enumerate(["train", "restval", "val"])
    ]
}
COCO = {
    "images": [{"id": i, "file_name": f"{i}.jpg", "domain": "near-domain"} for i in range(2)],
    "annotations": [{"image_id": i, "caption": "a dog", "id": i} for i in range(2)],
}
RESULTS = [{"image_id": i, "caption": "a dog"} for i in range(3)]
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


@fuzz
@given(st.data())
def test_forged_annotations(folder, data):
    (folder / "images").mkdir(exist_ok=True)
    for i in range(2):
        (folder / "images" / f"{i}.jpg").touch()
    path = folder / "captions.json"
    for document, reader in (
        (KARPATHY, lambda: read_karpathy(path, "train")),
        (COCO, lambda: coco_folder_records(folder)),
        (data.draw(st.sampled_from([KARPATHY, COCO])), lambda: read_references(path, "val")),
        (RESULTS, lambda: read_results(path)),
        ({"classes": {"a": "dog"}, "templates": ["a photo of a {}."]}, lambda: _read_classes(path)),
        ({"text": "a dog"}, lambda: read_texts(str(folder / "texts.jsonl"))),
    ):
        content = data.draw(forged(document))
        path.write_bytes(content)
        (folder / "texts.jsonl").write_bytes(content)
        with bounded():
            reader()
    for kind, document in (("OpenEnded_mscoco_val2014_questions", QUESTIONS), ("mscoco_val2014_annotations", ANSWERS)):
        (folder / f"v2_{kind}.json").write_bytes(data.draw(forged(document)))
    (folder / "images" / "COCO_val2014_000000000001.jpg").touch()
    with bounded():
        for record in vqa_records(folder, "val"):
            hash(record.id)
    packed = folder / "captions.json.gz"
    packed.write_bytes(data.draw(damaged(gzip.compress(json.dumps(COCO).encode()))))
    with bounded():
        coco_folder_records(folder, annotations=packed.name)


NUMBERED = {"images": [{"cocoid": 1, "imgid": 0, "split": "test", "sentences": [{"sentid": 7}]}]}
PAIR = {"id": 0, "image_0": "0", "image_1": "1", "caption_0": "a dog", "caption_1": "dog a"}
TALKS = [{"image": f"images/{i}.jpg", "conversations": [{"value": "?"}, {"value": "a dog"}]} for i in range(2)]
HYPOTHESIS = {"gold_label": "neutral", "Flickr30K_ID": "0", "pairID": "0.jpg#0r1n", "sentence2": "a dog"}
STATEMENT = {"identifier": "dev-0-0-0", "sentence": "two dogs", "label": "True", "left_url": "", "right_url": ""}
LABELLED = {"image": "0.jpg", "image2": "1.png", "text": "a dog", "label": "yes", "split": "train", "kind": "dogs"}
INSTANCES = {"categories": [{"id": 1, "name": "dog"}], "annotations": [{"image_id": 0, "category_id": 1}]}


@fuzz
@given(st.data())
def test_forged_annotations_of_evaluations(folder, data):
    (folder / "images").mkdir(exist_ok=True)
    for name in ("0.jpg", "1.jpg", "0.png", "1.png", "dev-0-0-img0.png", "dev-0-0-img1.png"):
        (folder / "images" / name).write_bytes(jpeg(3))
    for kind in SUGARCREPE:
        (folder / f"{kind}.json").write_text("{}")
    for kind in SUGARCREPE_PP:
        (folder / "pp" / f"{kind}.json").parent.mkdir(exist_ok=True)
        (folder / "pp" / f"{kind}.json").write_text("[]")
    texts = {"caption": "a", "caption2": "b", "negative_caption": "c"}
    crepe_pp = [{"id": i, "filename": f"{i}.jpg", **texts} for i in range(2)]
    (folder / "dataset_coco.json").write_text(json.dumps(KARPATHY))
    (folder / "eccv_image_to_caption.json").write_text("{}")
    crepe = {str(i): {"filename": f"{i}.jpg", "caption": "a", "negative_caption": "b"} for i in range(2)}
    docci = {"example_id": "0", "image_file": "0.jpg", "description": "a dog", "split": "test"}
    (folder / "synonyms.txt").write_bytes(data.draw(damaged(b"dog, puppy\ncat\n")))
    for name, document, reader in (
        ("add_obj.json", crepe, lambda: sugarcrepe_records(folder, folder / "images")),
        ("pp/swap_obj.json", crepe_pp, lambda: sugarcrepe_pp_records(folder / "pp", folder / "images")),
        ("eccv_caption_to_image.json", {"1": [2]}, lambda: eccv_positives(folder, folder)),
        ("dataset_coco.json", NUMBERED, lambda: eccv_positives(folder, folder)),
        ("examples.jsonl", PAIR, lambda: winoground_records(folder)),
        ("docci_descriptions.jsonlines", docci, lambda: docci_records(folder)),
        ("list.json", TALKS, lambda: sharegpt4v_records(folder, "list.json")),
        ("snli_ve_dev.jsonl", HYPOTHESIS, lambda: snli_ve_records(folder, "val", folder / "images")),
        ("dev.json", STATEMENT, lambda: nlvr2_records(folder, "val")),
        ("pairs.jsonl", LABELLED, lambda: [pairs_records(folder, "train"), pair_labels(folder)]),
        ("instances.json", INSTANCES, lambda: [Chair(folder / "synonyms.txt", folder / "instances.json")]),
    ):
        (folder / name).write_bytes(data.draw(forged(document)))
        with bounded():
            reader()
