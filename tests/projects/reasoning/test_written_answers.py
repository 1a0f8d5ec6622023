"""Answers that the decoder writes to questions."""

import pytest
import torch

from coca_lit.data.records import Record
from coca_lit.data.scenes.render import scene_records
from coca_lit.data.transforms import build_transform
from coca_lit.models import create_model
from coca_lit.projects.reasoning.written_answers import as_people_write, fitting, generate_answers
from coca_lit.tokenizer import get_tokenizer

QUESTIONS = ("is the ring red", "can we see a blue star on the left", "is it large", "is a small circle above it")


def questions() -> list[Record]:
    """Of several lengths, each about scenes of its own."""
    scenes = scene_records("val", count=12)
    return [scene._replace(question=QUESTIONS[i % len(QUESTIONS)]) for i, scene in enumerate(scenes)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("coca_tiny", tokenizer="scenes").eval()


@pytest.mark.parametrize("most", [None, 3])
def test_an_answer_is_what_the_model_writes_after_the_question(model, most: int | None) -> None:
    """However long the question is, whose tokens do not count."""
    records = questions()
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
    records = questions()
    first, again = (generate_answers(model, records, options={"strategy": "sample"}) for _ in range(2))
    assert first == again
    assert len(set(first.values())) > 1


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_an_answer_does_not_depend_on_the_other_questions(model, strategy: str) -> None:
    """The model never ends an answer by itself. A prompt is of captions."""
    records = questions()
    found = generate_answers(model, records, options={"strategy": strategy, "prompt": "a picture of"})
    assert list(found) == [record.id for record in records]
    starts = [len(model.tokenizer.encode(record.question)) - 1 for record in records]
    assert len(set(starts)) > 1
    for record, start in zip(records, starts, strict=True):
        image = build_transform(size=32)(record.image())[None]
        (ids,) = model.generate(image, prompt=record.question, max_length=start + 10, strategy=strategy)
        assert found[record.id] == model.tokenizer.decode(ids[start:])


def test_a_question_that_is_too_long_loses_its_last_words(model) -> None:
    long = "can we see the " + "small " * 30 + "ring"
    assert fitting(model.tokenizer, "is it the ring") == "is it the ring"
    assert fitting(model.tokenizer, long) == "can we see the " + " ".join(["small"] * 9)
    assert generate_answers(model, [questions()[0]._replace(question=long)])


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
    record, *_ = questions()
    asked = model.tokenizer.encode(record.question)[:-1]
    monkeypatch.setattr(model, "generate", lambda *_, **__: torch.tensor([[*asked, *model.tokenizer.encode("10")[1:]]]))
    assert generate_answers(model, [record]) == {record.id: "10"}
