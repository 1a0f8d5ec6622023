"""Places as texts: boxes are where the pixels are, and answers are judged by hand."""

from pathlib import Path

import numpy as np
import pytest

from coca_lit.data.scenes.render import captions, decode, render, scene_records
from coca_lit.evals.base import Settings
from coca_lit.metrics import is_share
from coca_lit.metrics.uncertainty import digest
from coca_lit.models import create_model
from coca_lit.projects.places import evaluation as evaluated
from coca_lit.projects.places.boxes import box_text, overlap, read_box
from coca_lit.projects.places.datamodule import ScenePlacesDataModule
from coca_lit.projects.places.evaluation import PlaceScores, is_right
from coca_lit.projects.places.scenes import (
    boxes_of_things,
    scene_place_questions,
    scene_place_records,
)
from coca_lit.runs.scores import cell, data_name, score_name
from helpers.datamodules import TOKENIZER
from helpers.running import TINY, run


def test_boxes_are_not_mirrored(tmp_path: Path) -> None:
    shared = {"tokenizer": TOKENIZER, "batch_size": 4, "cache_dir": str(tmp_path)}
    ScenePlacesDataModule(cached_augmentations=1, **shared)
    with pytest.raises(ValueError, match="cached_augmentations must be 0 or 1 for places"):
        ScenePlacesDataModule(cached_augmentations=2, **shared)


def test_scores_are_printed_as_shares() -> None:
    assert data_name("scenes_places") == "places in built-in scenes"
    assert score_name("scenes_places/box_accuracy") == "boxes right at IoU 0.5, %"
    for score in ("scenes_places/box_accuracy", "scenes_places/name_accuracy"):
        assert is_share(score)
        assert cell(score, 0.941) == "94.10"


@pytest.mark.parametrize("size", [32, 48, 100])
def test_boxes_hold_all_that_is_drawn_and_no_more(size: int) -> None:
    for record in scene_records("val", size, 40):
        pixels = np.asarray(render(int(record.id), size)).astype(int)
        drawn = np.abs(pixels - pixels[0, 0]).max(-1) > 8  # but the faintest pixels of antialiased edges
        for left, top, right, bottom in boxes_of_things(int(record.id), size):
            inside = drawn[top:bottom, left:right]
            assert all(edge.any() for edge in (inside[:2], inside[-2:], inside[:, :2], inside[:, -2:]))
            drawn[top:bottom, left:right] = False
        assert not drawn.any()


def test_questions_ask_for_the_box_of_a_thing_and_for_the_thing_in_a_box() -> None:
    records = scene_place_records("val", 32, 60)
    assert {record.domain for record in records} == {"caption", "where", "what"}
    asked = [record.id for record in records if record.domain != "caption"]
    assert [record.id for record in scene_place_questions("val", 32, 60)] == asked
    for record in records:
        number = int(str(record.id).partition("/")[0])
        named = {
            f"a {' '.join(thing)}": box
            for thing, box in zip(decode(number).things, boxes_of_things(number), strict=True)
        }
        if record.domain == "where":
            assert read_box(record.captions[0]) == named[record.question.removeprefix("where is ")]
        elif record.domain == "what":
            assert read_box(record.question.removeprefix("what is at ")) == named[record.captions[0]]
        else:
            assert (record.question, record.captions) == ("", captions(decode(number)))
    assert len({record.image for record in records}) == 60  # drawn once each


def test_boxes_as_texts() -> None:
    assert box_text((6, 10, 28, 32), 64) == "<3 5 14 16>"
    assert read_box("<3 5 14 16>") == read_box("3 5 14 16 ") == (3, 5, 14, 16)
    for text in ("3 5 14", "a red ring", "3 5 14 1e9", "", "3 5 14 16 2", "3 5 14 99999"):
        assert read_box(text) is None
    assert overlap((0, 0, 4, 4), (2, 0, 6, 4)) == pytest.approx(8 / 24)
    for one, other in (((0, 0, 4, 4), (4, 0, 8, 4)), ((2, 2, 2, 2),) * 2, ((4, 4, 0, 0), (0, 0, 4, 4))):
        assert overlap(one, other) == 0
    assert is_right("0 0 4 4", "<0 0 4 2>")
    assert not is_right("0 0 4 5", "<0 0 4 2>")
    assert not is_right("a red ring", "<0 0 4 2>")
    assert is_right("a red ring ", "a red ring")
    assert not is_right("a red", "a red ring")


def test_scores_are_shares_of_questions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    questions = scene_place_questions("val", 32, 50)
    where = [record for record in questions if record.domain == "where"]
    answers = {record.id: record.captions[0] for record in questions} | {record.id: "0 0 1 1" for record in where[:10]}
    monkeypatch.setattr(evaluated, "generate_answers", lambda *_: answers)
    evaluation = PlaceScores("places", questions)
    found = evaluation.evaluate(create_model("coca_tiny", tokenizer="scenes_places"), Settings(tmp_path))
    assert found == {"places/box_accuracy": pytest.approx(1 - 10 / len(where)), "places/name_accuracy": 1.0}
    assert set(evaluation.draws) == set(found)
    scenes = [next(r.id for r in questions if r.image == image) for image in dict.fromkeys(r.image for r in questions)]
    assert {draws.units for draws in evaluation.draws.values()} == {digest(scenes)}
    without = create_model("coca_tiny", decoder_layers=0)
    assert evaluation.evaluate(without, Settings(tmp_path)) == {}
    assert "no decoder" in evaluation.not_run["places places"]
    of_pairs = evaluation.evaluate(create_model("coca_tiny", tokenizer="clip"), Settings(tmp_path))
    assert of_pairs == {"places/name_accuracy": 1.0}
    assert "vocabulary" in evaluation.not_run["places boxes"]
    assert PlaceScores("boxes", where).evaluate(create_model("coca_tiny", tokenizer="clip"), Settings(tmp_path)) == {}


@pytest.mark.slow
def test_a_few_steps_of_the_experiment(tmp_path: Path) -> None:
    words = ("experiment=scenes_places", "evals=[scenes_boxes]", "data.train_count=32", "data.batch_size=8")
    results = run(tmp_path, *TINY, *words)
    assert {"scenes_places/box_accuracy", "scenes_places/name_accuracy"} <= set(results)
