"""Statements about scenes: labels are what one finds by trying all that may be covered; texts or images alone say
nothing about them.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest

from coca_lit.data.records import Record
from coca_lit.data.scenes.render import COLOURS, SHAPES, Thing, decode, render
from coca_lit.projects.reasoning.scene_data import SceneStatementsDataModule
from coca_lit.projects.reasoning.scene_statements import (
    BOARD,
    LABELS,
    TRUTHS,
    VOCABULARY,
    comparison_records,
    entailment_records,
    show,
)
from coca_lit.tokenizer import WordTokenizer

COUNT = 120
PLACES = {"left": 0, "top": 0, "middle": 1, "right": 2, "bottom": 2}
EVERYTHING = [Thing("small", *kind) for kind in product(COLOURS, SHAPES)]


def is_true(text: str, things: Sequence[Thing]) -> bool:
    """Of three things, read from the words."""
    if found := re.fullmatch(r"the thing (?:on|in|at) the (\w+) is (\w+)", text):
        return things[PLACES[found[1]]].colour == found[2]
    if found := re.fullmatch(r"there are at least two (\w+?)(?: things)?", text):
        return sum(is_a(thing, found[1]) for thing in things) >= 2
    found = re.fullmatch(r"a (\w+) thing is (?:above|to the left of) a (\w+) thing", text)
    assert found, text
    pairs = ((i, j) for i in range(3) for j in range(i + 1, 3))
    return any(things[i].colour == found[1] and things[j].colour == found[2] for i, j in pairs)


def is_a(thing: Thing, name: str) -> bool:
    return name in (thing.colour, thing.shape, f"{thing.shape}s", f"{thing.shape}es")


def holds(text: str, left: Sequence[Thing], right: Sequence[Thing]) -> bool:
    """Of two scenes."""
    if found := re.fullmatch(r"(both pictures show|only one picture shows) a (\w+?)(?: thing)?", text):
        shown = sum(any(is_a(thing, found[2]) for thing in scene) for scene in (left, right))
        return shown == (2 if found[1].startswith("both") else 1)
    found = re.fullmatch(r"there are more (\w+?)(?: things)? on the (left|right)", text)
    assert found, text
    on_left, on_right = (sum(is_a(thing, found[1]) for thing in scene) for scene in (left, right))
    return on_left > on_right if found[2] == "left" else on_right > on_left


def scene_of(image: object) -> tuple[int, int | None]:
    number, covered, _ = image.args  # type: ignore[attr-defined]
    return number, covered


def test_entailment_is_what_holds_whatever_is_covered() -> None:
    records = entailment_records("val", count=COUNT)
    assert {record.domain for record in records} == {"colour", "count", "relation"}
    for record in records:
        number, covered = scene_of(record.image)
        things = decode(number, 3).things
        assert covered is not None
        possible = {
            is_true(record.question, [*things[:covered], hidden, *things[covered + 1 :]]) for hidden in EVERYTHING
        }
        label = "neutral" if len(possible) == 2 else "entailment" if possible == {True} else "contradiction"
        assert record.captions == (label,), (record.question, things, covered)


def test_comparisons_are_true_or_false() -> None:
    records = comparison_records("val", count=COUNT)
    assert {record.domain for record in records} == {"more", "both", "one"}
    for record in records:
        left, right = (decode(scene_of(image)[0], 3).things for image in record.images)
        assert record.captions == (TRUTHS[holds(record.question, left, right)],), (record.question, left, right)


@pytest.mark.parametrize(("make", "labels"), [(entailment_records, LABELS), (comparison_records, TRUTHS)])
def test_neither_text_nor_images_say_anything_about_the_label(make, labels: Sequence[str]) -> None:
    """Equally many of each label for every text of a kind, and for all that is shown: no guess from one of them can be
    right more often than by chance.
    """
    records: list[Record] = make("val", count=COUNT)
    by_text: dict[object, Counter[str]] = defaultdict(Counter)
    by_images: dict[object, Counter[str]] = defaultdict(Counter)
    for record in records:
        by_text[record.domain, record.question][record.captions[0]] += 1
        by_images[record.images][record.captions[0]] += 1
    for counts in (*by_text.values(), *by_images.values()):
        assert len(counts) == len(labels)
        assert len(set(counts.values())) == 1
    kinds = Counter(record.domain for record in records)
    assert max(kinds.values()) < 1.2 * min(kinds.values())


def test_splits_share_no_scene() -> None:
    numbers = []
    for split in ("train", "val", "test"):
        records = [*entailment_records(split, count=60), *comparison_records(split, count=60)]
        numbers.append({scene_of(image)[0] for record in records for image in record.images})
    assert not numbers[0] & numbers[1] | numbers[0] & numbers[2] | numbers[1] & numbers[2]
    assert all(len(found) > 60 for found in numbers)


def test_the_board_hides_a_thing_and_nothing_else() -> None:
    hidden = 0
    for record in entailment_records("val", count=60)[::3]:
        number, covered = scene_of(record.image)
        scene = decode(number, 3)
        bare, shown = (np.asarray(image).astype(int) for image in (render(number, 48, 3), show(number, covered)))
        if scene.axis == "column":
            bare, shown = bare.transpose(1, 0, 2), shown.transpose(1, 0, 2)
        board = slice(16 * covered, 16 * covered + 16)
        assert (shown[:, board] == BOARD).all()
        rest = [i for i in range(48) if not board.start <= i < board.stop]
        np.testing.assert_array_equal(shown[:, rest], bare[:, rest])
        colour = np.array(COLOURS[scene.things[covered].colour])
        if all(thing.colour != scene.things[covered].colour for i, thing in enumerate(scene.things) if i != covered):
            hidden += 1
            assert (np.abs(bare - colour).sum(axis=2) == 0).any()
            assert not (np.abs(shown - colour).sum(axis=2) < 20).any()
    assert hidden > 10


def test_words_are_known() -> None:
    records = [*entailment_records("train", count=600), *comparison_records("train", count=600)]
    words = {word for record in records for text in (record.question, *record.captions) for word in text.split()}
    assert words <= set(VOCABULARY)
    assert len(VOCABULARY) == len(set(VOCABULARY))


@pytest.mark.parametrize(("task", "splits", "keeps"), [("entailment", 64, 66), ("comparison", 66, 64)])
def test_statements_that_a_batch_splits_are_told(task, splits, keeps, caplog):
    tokenizer = WordTokenizer(VOCABULARY, 24)
    SceneStatementsDataModule(task, tokenizer=tokenizer, batch_size=keeps)
    assert not caplog.text
    data = SceneStatementsDataModule(
        task, tokenizer=WordTokenizer(VOCABULARY, 24), batch_size=splits, train_count=48, val_split=None
    )
    assert f"data.batch_size={splits} splits statements" in caplog.text
    assert f"a multiple of {data.together}" in caplog.text
