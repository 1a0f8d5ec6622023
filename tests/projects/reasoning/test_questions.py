"""Questions: the official files of VQA v2, those about scenes, and what a training example of one is."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean

import pytest
from PIL import Image

from coca_lit.cli.module import with_vocabulary
from coca_lit.data.datamodule import RootDataModule
from coca_lit.data.scenes.render import AXES, decode, scene_records
from coca_lit.errors import DataError, DataNotFoundError
from coca_lit.models.presets import VOCABULARIES
from coca_lit.projects.reasoning.accuracy import blind_answers, vqa_accuracy
from coca_lit.projects.reasoning.scene_data import SceneQuestionsDataModule
from coca_lit.projects.reasoning.scene_questions import (
    KINDS,
    VOCABULARY,
    questions,
    scene_question_records,
)
from coca_lit.projects.reasoning.vqa_files import frequent_answers, vqa_records
from coca_lit.tokenizer import WordTokenizer
from helpers.running import compose

TOKENIZER = WordTokenizer(VOCABULARY, 24)


def write_vqa(root: Path) -> None:
    """Six questions about two images, in the official schema."""
    split = "train2014"
    (root / split).mkdir()
    asked, annotations = [], []
    for image in (9, 25):
        Image.new("RGB", (40, 30)).save(root / split / f"COCO_{split}_{image:012d}.jpg")
        for n in range(3):
            id = image * 1000 + n
            asked.append({"image_id": image, "question": f"How many {n}?", "question_id": id})
            people = [
                {"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(["2"] * 6 + ["3"] * 4)
            ]
            annotations.append(
                {"question_type": "how many", "multiple_choice_answer": "2", "answers": people[::-1], "image_id": image}
                | {"answer_type": "yes/no" if n else "number", "question_id": id}
            )
    about = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": split}
    (root / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps({**about, "questions": asked}))
    (root / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps({**about, "annotations": annotations}))


def test_official_files(tmp_path: Path) -> None:
    write_vqa(tmp_path)
    records = vqa_records(tmp_path, "train")
    assert [record.id for record in records] == [9000, 9001, 9002, 25000, 25001, 25002]
    assert records[0].question == "How many 0?"
    assert records[0].captions == ("2",) * 6 + ("3",) * 4  # the most frequent first
    assert [record.domain for record in records[:2]] == ["number", "yes-no"]
    assert records[0].image().size == (40, 30)
    assert frequent_answers(tmp_path) == ["2"]
    data = RootDataModule(str(tmp_path), vqa_records, tokenizer=TOKENIZER, batch_size=6, image_size=16, val_split=None)
    assert next(iter(data.train_dataloader())).images.shape == (6, 3, 16, 16)


def test_photos_of_2015_keep_their_names(tmp_path: Path) -> None:
    """Also beside the training photos of 2017, whose names lost a prefix."""
    for folder in ("train2017", "test2015"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "test2015" / "COCO_test2015_000000000001.jpg")
    questions = [{"image_id": 1, "question": "What?", "question_id": 7}]
    content = json.dumps({"data_subtype": "test-dev2015", "questions": questions})
    (tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json").write_text(content)
    (record,) = vqa_records(tmp_path, "test-dev")
    assert record.image().size == (4, 4)


def test_missing_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"val2014_questions\.json.*visualqa\.org"):
        vqa_records(tmp_path, "val")
    with pytest.raises(DataError, match=r"train, val, test-dev, test.*'dev'"):
        vqa_records(tmp_path, "dev")
    write_vqa(tmp_path)
    (tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json").write_text('{"questions": []}')
    with pytest.raises(DataError, match="'data_subtype'"):
        vqa_records(tmp_path, "train")


# Scenes


def truth(number: int, question: str) -> list[str]:
    """All right answers, by looking at the scene: things that fit the words, then what is asked about them."""
    scene = decode(number)
    words = question.replace("crosses", "cross").replace("things", "thing").split()
    words = [word[:-1] if word[:-1] in ("circle", "square", "triangle", "star", "ring") else word for word in words]
    named = [
        w for w in words if any(w in thing for thing in [t for n in range(0, 18432, 97) for t in decode(n).things])
    ]
    fits = [i for i, thing in enumerate(scene.things) if all(word in thing for word in named)]
    if question.startswith("how many"):
        return [str(len(fits))]
    ends = (AXES[scene.axis]["start"], AXES[scene.axis]["end"])
    return [ends[i] if words[0] == "where" else getattr(scene.things[i], words[1]) for i in fits]


def test_every_question_about_a_scene_has_one_answer_and_it_is_right() -> None:
    for record in scene_records("val", count=100):
        for _, question, answer in questions(int(record.id)):
            assert truth(int(record.id), question) == [answer], question


def test_questions_of_a_scene_are_always_the_same_and_their_words_are_known() -> None:
    records = scene_question_records("train", count=400)
    again = scene_question_records("train", count=400)
    assert [(r.id, r.question, r.captions) for r in records] == [(r.id, r.question, r.captions) for r in again]
    assert len({record.id for record in records}) == len(records)
    words = {word for record in records for word in f"{record.question} {record.captions[0]}".split()}
    captions = VOCABULARIES["scenes"]
    assert words <= set(VOCABULARY)
    assert VOCABULARY[: len(captions)] == captions


def test_who_does_not_look_is_seldom_right() -> None:
    training, asked = scene_question_records("train"), scene_question_records("val")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in training:
        counts[record.domain or ""].update(record.captions[:1])
    assert set(counts) == set(KINDS)
    for kind, answers in counts.items():
        assert max(answers.values()) < 1.35 * min(answers.values()), kind
    questions = {record.id: record.question for record in asked}
    guesses = blind_answers(questions, [(record.question, record.captions[0]) for record in training])
    assert fmean(vqa_accuracy(guesses[record.id], record.captions) for record in asked) < 0.25


# Training examples


def test_an_example_is_the_question_and_an_answer_to_predict() -> None:
    data = SceneQuestionsDataModule(tokenizer=TOKENIZER, batch_size=6, image_size=16, train_count=4)
    assert frequent_answers()[:2] == ["top", "left"]
    for batch in data.train_dataloader():
        assert batch.prefix_lengths is not None
        for row, given, length, answers in zip(
            batch.tokens, batch.prefix_lengths, batch.lengths, batch.extras["captions"], strict=True
        ):
            assert row[0] == TOKENIZER.sot_id
            assert TOKENIZER.decode(row[given:]) == answers[0]
            assert TOKENIZER.decode(row[1:given]).split()[0] in ("what", "how", "where")
            assert row[length - 1] == TOKENIZER.eot_id


def test_the_vocabulary_of_a_run_has_the_words_of_questions() -> None:
    cfg = with_vocabulary(compose("data=scenes_vqa", "data.train_count=8", "vocabulary=1"))
    asked = {word for record in scene_question_records("train", count=8) for word in record.question.split()}
    assert asked <= {*cfg.model.net.tokenizer}
