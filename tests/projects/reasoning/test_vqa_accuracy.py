"""VQA: normalisation and accuracy by hand, blind guesses, scores of answers."""

import itertools

import numpy as np
import pytest
import torch

from coca_lit.data.records import Record
from coca_lit.evals import Settings
from coca_lit.metrics.uncertainty import resamples
from coca_lit.models import create_model
from coca_lit.projects.reasoning.accuracy import blind_answers, normalize_answer, vqa_accuracy
from coca_lit.projects.reasoning.evaluations import VQAScores, answer_accuracies, answer_draws
from coca_lit.projects.reasoning.scene_questions import scene_question_records


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The dog.", "dog"),
        ("a  cat\tand an owl\n", "cat and owl"),
        ("Two", "2"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("black/white", "black white"),  # inside a word a mark separates
        ("red, blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),  # such a comma makes all marks vanish
        ("3.", "3"),
        ("2:30 p.m.", "2:30 pm"),
        ("shes", "shes"),  # not in the official table
        ("somebody'd", "somebodyd"),
    ],
)
def test_normalisation_by_hand(answer: str, expected: str) -> None:
    assert normalize_answer(answer) == expected


@pytest.mark.parametrize(("same", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_by_the_number_of_people(same: int, expected: float) -> None:
    """1 of 10: the one is left out once, else 1/3. 3: left out in three cases of ten, 0.3 · 2/3 + 0.7 · 1 = 0.9."""
    people = ["red"] * same + ["blue"] * (10 - same)
    assert vqa_accuracy("red", people) == pytest.approx(expected)


def test_accuracy_is_the_mean_over_ways_to_leave_one_out() -> None:
    people = ["two", "2", "2.", "three", "3", "a lot", "many", "2", "four", "5"]
    for answer in ("2", "Two", "3", "many", "nothing"):
        same = [normalize_answer(answer) == normalize_answer(person) for person in people]
        ways = [min(sum(others) / 3, 1) for others in itertools.combinations(same, 9)]
        assert vqa_accuracy(answer, people) == pytest.approx(sum(ways) / 10)


def test_where_all_agree_nothing_is_normalised() -> None:
    assert vqa_accuracy("the dog", ["the dog"] * 10) == 1
    assert vqa_accuracy("dog", ["the dog"] * 10) == 0
    assert vqa_accuracy("dog", ["the dog"] * 9 + ["cat"]) == 1
    with pytest.raises(ValueError, match="answers"):
        vqa_accuracy("dog", [])


def test_scores_of_all_and_of_each_kind() -> None:
    asked = [(1, "red", "other"), (2, "red", "other"), (3, "1", "number"), (4, "yes", None)]
    records = [Record(id, "unused.jpg", [answer] * 10, domain=kind, question="?") for id, answer, kind in asked]
    answers = {"": {1: "red", 2: "blue", 3: "1", 4: "yes"}, "blind": dict.fromkeys(range(1, 5), "red")}
    scores = answer_accuracies(records, answers)
    assert scores == {"accuracy": 0.75, "other/accuracy": 0.5, "number/accuracy": 1, "blind/accuracy": 0.5}


def test_blind_guesses_are_the_usual_answers() -> None:
    training = [("what colour", colour) for colour in ("red", "red", "blue")] + [("how many", "2")] * 5
    asked = {1: "what colour", 2: "how many", 3: "where"}
    assert blind_answers(asked, training) == {1: "red", 2: "2", 3: "2"}
    with pytest.raises(ValueError, match="no answers to guess from"):
        blind_answers(asked, [])


def test_questions_are_drawn_with_their_image() -> None:
    people = [["yes"] * 10, ["no"] * 10, ["2"] * 10, ["2"] * 5 + ["3"] * 5, ["red"] * 10]
    images = ["a.jpg", "a.jpg", "b.jpg", "c.jpg", "c.jpg"]
    kinds = ["yes-no", "yes-no", "number", "number", None]
    records = [Record(i, images[i], people[i], domain=kinds[i], question="?") for i in range(5)]
    answers = {"": {0: "yes", 1: "yes", 2: "2", 3: "2", 4: "blue"}, "blind": dict.fromkeys(range(5), "yes")}
    scores, draws = answer_accuracies(records, answers), answer_draws(records, answers)
    assert scores.keys() == draws.keys() == {"accuracy", "yes-no/accuracy", "number/accuracy", "blind/accuracy"}
    (counts,) = resamples(3)
    for draw in range(5):
        drawn = np.array([counts[draw]["abc".index(name[0])] for name in images])
        accuracies = [vqa_accuracy(answers[""][i], people[i]) for i in range(5) for _ in range(int(drawn[i]))]
        assert draws["accuracy"].values[draw] == pytest.approx(np.mean(accuracies))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("coca_tiny", tokenizer="scenes_vqa").eval()


def test_predictions_are_in_the_official_format_and_hidden_answers_are_no_error(model, tmp_path) -> None:
    records = scene_question_records("val", count=3)
    results = VQAScores("vqa", records, training_records=lambda: records).evaluate(model, Settings(tmp_path))
    assert results["vqa/blind/accuracy"] == 1  # it has seen these very questions
    assert {"vqa/accuracy", "vqa/colour/accuracy", "vqa/place/accuracy"} <= results.keys()
    text = (tmp_path / "predictions" / "vqa.json").read_text()
    assert text.count('"question_id"') == text.count('"answer"') == len(records)
    without = VQAScores("vqa", records, training_records=lambda: [r._replace(captions=()) for r in records])
    assert without.evaluate(model, Settings(tmp_path)).keys() == results.keys() - {"vqa/blind/accuracy"}
    assert without.not_run == {"vqa blind": "the training has no answers to guess from"}
    hidden = VQAScores("hidden", [record._replace(captions=()) for record in records])
    assert hidden.evaluate(model, Settings(tmp_path)) == {}
    assert hidden.not_run == {"hidden accuracy": "the answers to these questions are not public"}
    assert (tmp_path / "predictions" / "hidden.json").is_file()
