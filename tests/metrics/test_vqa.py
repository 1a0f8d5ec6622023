"""VQA: normalisation and accuracy by hand, blind guesses, and answers written by a model."""

import itertools

import pytest
import torch

from coca_lit.data.records import Record
from coca_lit.data.scenes.facts import scene_question_records
from coca_lit.data.transforms import build_transform
from coca_lit.evals import Settings
from coca_lit.evals.answers import as_people_write, fitting, generate_answers
from coca_lit.evals.vqa import VQAScores, _accuracies
from coca_lit.metrics.vqa import CONTRACTIONS, blind_answers, normalize_answer, vqa_accuracy
from coca_lit.models import create_model
from coca_lit.tokenizer import get_tokenizer


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


def test_contractions_are_those_of_the_official_table() -> None:
    assert len(CONTRACTIONS) == 114
    known = {"aint": "ain't", "ow's'at": "'ow's'at", "'ow'sat": "'ow's'at", "yall'd've": "y'all'd've", "twas": "'twas"}
    assert known.items() <= CONTRACTIONS.items()
    assert not {"lets", "shes", "wed", "well"} & CONTRACTIONS.keys()


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
    scores, draws = _accuracies(records, answers, full=False)
    assert scores == {"accuracy": 0.75, "other/accuracy": 0.5, "number/accuracy": 1, "blind/accuracy": 0.5}
    assert not draws


def test_blind_guesses_are_the_usual_answers() -> None:
    training = [("what colour", colour) for colour in ("red", "red", "blue")] + [("how many", "2")] * 5
    asked = {1: "what colour", 2: "how many", 3: "where"}
    assert blind_answers(asked, training) == {1: "red", 2: "2", 3: "2"}
    with pytest.raises(ValueError, match="no answers to guess from"):
        blind_answers(asked, [])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("coca_tiny", tokenizer="scenes_vqa").eval()


@pytest.mark.parametrize("most", [None, 3])
def test_an_answer_is_what_the_model_writes_after_the_question(model, most: int | None) -> None:
    """However long the question is, whose tokens do not count."""
    records = scene_question_records("val", count=4)
    options = {"max_length": most, "min_length": 20}  # which is of captions
    answers = generate_answers(model, records, batch_size=1, options=options)
    assert list(answers) == [record.id for record in records]
    for record in records[:3]:
        ids = _greedy(model, record, tokens=(most or 10) - 1)
        assert answers[record.id] == model.tokenizer.decode(ids)


def _greedy(model, record: Record, tokens: int) -> list[int]:
    """Naively: the likeliest next token of the whole text, again and again."""
    image = build_transform(size=32)(record.image())[None]
    ids = model.tokenizer.encode(record.question)[:-1]
    written: list[int] = []
    while len(written) < tokens and (not written or written[-1] != model.tokenizer.eot_id):
        text = torch.tensor([[*ids, *written, 0]])
        with torch.no_grad():
            logits = model(image, text, torch.tensor([text.shape[1]])).logits
        written.append(int(logits[-1].argmax()))
    return written


def test_answers_that_are_drawn_are_the_same_each_time(model) -> None:
    records = scene_question_records("val", count=4)
    first, again = (generate_answers(model, records, options={"strategy": "sample"}) for _ in range(2))
    assert first == again
    assert len(set(first.values())) > 1


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_an_answer_does_not_depend_on_the_other_questions(model, strategy: str) -> None:
    """The model never ends an answer by itself. A prompt is of captions."""
    records = scene_question_records("val", count=4)
    found = generate_answers(model, records, options={"strategy": strategy, "prompt": "a picture of"})
    assert list(found) == [record.id for record in records]
    starts = [len(model.tokenizer.encode(record.question)) - 1 for record in records]
    assert len(set(starts)) > 1
    for record, start in zip(records, starts, strict=True):
        image = build_transform(size=32)(record.image())[None]
        (ids,) = model.generate(image, prompt=record.question, max_length=start + 10, strategy=strategy)
        assert found[record.id] == model.tokenizer.decode(ids[start:])


def test_a_question_that_is_too_long_loses_its_last_words(model) -> None:
    long = "what colour is the " + "small " * 30 + "ring"
    assert fitting(model.tokenizer, "where is the ring") == "where is the ring"
    assert fitting(model.tokenizer, long) == "what colour is the " + " ".join(["small"] * 9)
    assert generate_answers(model, [scene_question_records("val", count=1)[0]._replace(question=long)])


def test_a_question_without_blanks_loses_its_last_characters() -> None:
    tokenizer, long = get_tokenizer("clip"), "图片里的东西是什么颜色的" * 20
    kept = fitting(tokenizer, long)
    longest = max(n for n in range(len(long)) if tokenizer.lengths([long[:n]])[0] - 1 <= tokenizer.context_length - 10)
    assert kept == long[:longest] != ""


@pytest.mark.parametrize(
    "answer",
    [
        *("10", "2009", "1.5", "1,000", "10:30", "9/11", "$20", "100%", "#1", "1st", "5:30 pm", "10 p.m.", "u.s.a."),
        *("t-shirt", "men's", "2 dogs", "3 o'clock", "red , white", "1990s", "5'6", "a&w", "salt & pepper"),
    ],
)
def test_answers_in_byte_pairs_are_those_of_people(answer: str) -> None:
    tokenizer = get_tokenizer("clip")
    assert as_people_write(tokenizer.decode(tokenizer.encode(answer))) == answer


def test_a_number_is_answered_in_byte_pairs(monkeypatch) -> None:
    """Beyond the digits that the decoder writes, see `as_people_write`."""
    model = create_model("coca_tiny", tokenizer="clip").eval()
    record, *_ = scene_question_records("val", count=1)
    asked = model.tokenizer.encode(record.question)[:-1]
    monkeypatch.setattr(model, "generate", lambda *_, **__: torch.tensor([[*asked, *model.tokenizer.encode("10")[1:]]]))
    assert generate_answers(model, [record]) == {record.id: "10"}


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
