"""Facts in captions of the built-in scenes: all of the own captions, and false captions worked by hand."""

import pytest

from coca_lit.data.records import Record
from coca_lit.data.scenes.facts import Mention, scene_facts, statement
from coca_lit.data.scenes.render import WORDINGS, captions, decode, scene_records
from coca_lit.metrics.uncertainty import Ratios, exact

TRUE = "a small red circle to the left of a large blue star"


def scores(caption: str, true: str = TRUE) -> dict[str, float]:
    """Precision and recall by kind."""
    found = exact(1, Ratios(scene_facts([Record(0, "x.png", [true])], {0: caption})))
    return {kind: (found[f"{kind}_precision"], found[f"{kind}_recall"]) for kind in ("object", "attribute", "relation")}


@pytest.mark.parametrize("objects", [2, 3])
def test_every_caption_states_its_scene(objects: int) -> None:
    for record in scene_records("val", count=100, objects=objects):
        scene = decode(record.id, objects)
        things = tuple(Mention(thing.shape, (thing.size, thing.colour)) for thing in scene.things)
        for caption in captions(scene, WORDINGS):
            assert statement(caption) == (things, scene.axis)
    records = scene_records("val", count=20, objects=objects)
    found = exact(20, Ratios(scene_facts(records, {record.id: record.captions[-1] for record in records})))
    assert found == dict.fromkeys(found, 1.0)
    assert len(found) == 6


@pytest.mark.parametrize(
    ("caption", "objects", "attributes", "relations"),
    [
        ("a large blue star to the right of a small red circle", (1, 1), (1, 1), (1, 1)),  # in other words
        ("a large blue star to the left of a small red circle", (1, 1), (1, 1), (0, 0)),
        ("a small red circle above a large blue star", (1, 1), (1, 1), (0, 0)),
        ("a small red circle to the left of a large blue ring", (0.5, 0.5), (0.5, 0.5), (0, 0)),
        ("a small red circle to the left of a large pink star", (1, 1), (0.75, 0.75), (0, 0)),
        ("a circle to the left of a star", (1, 1), (None, 0), (1, 1)),  # what is not said is not wrong
        ("a red circle", (1, 0.5), (1, 0.25), (None, 0)),
        ("a red circle by a red circle", (0.5, 0.5), (0.5, 0.25), (None, 0)),  # no wording has "by"
        ("red circle", (None, 0), (None, 0), (None, 0)),
        ("", (None, 0), (None, 0), (None, 0)),
    ],
)
def test_by_hand(caption: str, objects: tuple, attributes: tuple, relations: tuple) -> None:
    found = scores(caption)
    for kind, (precision, recall) in (("object", objects), ("attribute", attributes), ("relation", relations)):
        assert found[kind] == (pytest.approx(float("nan") if precision is None else precision, nan_ok=True), recall)


def test_two_alike_are_told_apart_by_their_colours() -> None:
    true = "a small red circle above a small blue circle"
    assert scores("a small blue circle above a small red circle", true)["relation"] == (0, 0)
    assert scores("a circle above a blue circle", true)["relation"] == (1, 1)
