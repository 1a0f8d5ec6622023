"""Annotations of questions and statements that a stranger has written are refused in one sentence."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coca_lit.projects.reasoning.statement_files import nlvr2_records, pair_labels, pairs_records, snli_ve_records
from coca_lit.projects.reasoning.vqa_files import vqa_records
from helpers.fuzzing import bounded, forged, fuzz
from helpers.shards import jpeg

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


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
def test_forged_questions_and_answers(folder, data):
    (folder / "images").mkdir(exist_ok=True)
    for kind, document in (("OpenEnded_mscoco_val2014_questions", QUESTIONS), ("mscoco_val2014_annotations", ANSWERS)):
        (folder / f"v2_{kind}.json").write_bytes(data.draw(forged(document)))
    (folder / "images" / "COCO_val2014_000000000001.jpg").touch()
    with bounded():
        for record in vqa_records(folder, "val"):
            hash(record.id)


HYPOTHESIS = {"gold_label": "neutral", "Flickr30K_ID": "0", "pairID": "0.jpg#0r1n", "sentence2": "a dog"}
STATEMENT = {"identifier": "dev-0-0-0", "sentence": "two dogs", "label": "True", "left_url": "", "right_url": ""}
LABELLED = {"image": "0.jpg", "image2": "1.png", "text": "a dog", "label": "yes", "split": "train", "kind": "dogs"}


@fuzz
@given(st.data())
def test_forged_statements(folder, data):
    (folder / "images").mkdir(exist_ok=True)
    for name in ("0.jpg", "1.jpg", "0.png", "1.png", "dev-0-0-img0.png", "dev-0-0-img1.png"):
        (folder / "images" / name).write_bytes(jpeg(3))
    for name, document, reader in (
        ("snli_ve_dev.jsonl", HYPOTHESIS, lambda: snli_ve_records(folder, "val", folder / "images")),
        ("dev.json", STATEMENT, lambda: nlvr2_records(folder, "val")),
        ("pairs.jsonl", LABELLED, lambda: [pairs_records(folder, "train"), pair_labels(folder)]),
    ):
        (folder / name).write_bytes(data.draw(forged(document)))
        with bounded():
            reader()
