"""CHAIR worked by hand, with the rules of the authors' code, and from files in the original format."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from coca_lit.data.records import Record
from coca_lit.errors import DataError
from coca_lit.evals import Settings
from coca_lit.evals.captions import CaptionScores
from coca_lit.metrics.uncertainty import Ratios, exact
from coca_lit.projects.choice.chair import Chair, ObjectWords, chair
from helpers.evaluating import make_model, noise
from helpers.running import without_java

SYNONYMS = """person, girl, man, woman, child, player, baby, adult
bicycle, bike, one, two
bus
dog, puppy
bird
train, jet
chair, seat
toilet
fire hydrant, hydrant
sports ball, ball
tennis racket, racket
wine glass
hot dog
knife
plate
tie
shelf"""


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("A man rides a bike.", ["person", "bicycle"]),
        ("Two men and women, and puppies", ["bicycle", "person", "person", "dog"]),  # as here "two" is a bicycle
        ("children's knives", ["person", "knife"]),
        ("the buses", ["bus"]),
        ("a baby bird, a baby and an adult dog", ["bird", "person", "dog"]),
        ("a passenger train", ["train"]),
        ("the seat", ["chair"]),
        ("the toilet seat", ["toilet"]),
        ("a seat beside a toilet", ["toilet"]),
        ("red fire hydrants", ["fire hydrant"]),
        ("a tennis racket and a sports ball", ["tennis racket", "sports ball"]),
        ("wine glasses and hot dogs", ["wine glass", "hot dog"]),
        ("the home plate", []),  # no plate
        ("a bow tie", ["tie"]),
        ("the shelves", ["shelf"]),
        ("dog dog cat", ["dog", "dog"]),
        ("", []),
    ],
)
def test_objects_in_captions(caption: str, objects: list[str]) -> None:
    find = ObjectWords([line.split(", ") for line in SYNONYMS.splitlines()])
    assert find(caption) == objects


def test_shares_by_hand() -> None:
    """Three of seven objects are not shown, in two of four captions: each counts as often as it is named."""
    named = [["dog", "dog", "cat", "cat"], ["dog"], [], ["cat", "cup"]]
    shown = [{"dog"}, {"dog", "cat"}, set(), {"cup", "dog"}]
    assert exact(4, Ratios(chair(named, shown))) == {"CHAIRi": pytest.approx(3 / 7), "CHAIRs": 0.5}


def test_of_two_groups_the_later_one_counts() -> None:
    assert ObjectWords([["dog", "puppy"], ["toy", "puppy"]])("a puppy and a dog") == ["toy", "dog"]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The authors' synonyms and COCO's annotations: a dog and a bus in image 0, a person in image 1."""
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    categories = [{"id": 1, "name": "person"}, {"id": 6, "name": "bus"}, {"id": 18, "name": "dog"}]
    annotations = [{"image_id": i, "category_id": c} for i, c in ((0, 18), (0, 6), (1, 1))]
    (tmp_path / "instances.json").write_text(json.dumps({"categories": categories, "annotations": annotations}))
    return tmp_path / "synonyms.txt", tmp_path / "instances.json"


def test_files_and_references(files: tuple[Path, Path]) -> None:
    records = [Record(0, partial(noise, 0), ["a dog"]), Record(1, partial(noise, 1), ["a girl", "a girl on a bike"])]
    captions = {0: "a puppy and a man", 1: "a child rides a bike with a knife"}
    # Of image 1 the bicycle is in the second reference alone. The man and the knife are not there.
    assert exact(2, Ratios(Chair(*files)(records, captions))) == {"CHAIRi": 2 / 5, "CHAIRs": 1.0}
    with pytest.raises(DataError, match="annotated"):
        Chair(*files)([records[0]._replace(id=7)], {7: "a dog"})


def test_images_that_the_files_do_not_list_are_no_images_without_objects(files: tuple[Path, Path]) -> None:
    content = json.loads(files[1].read_text())
    files[1].write_text(json.dumps({**content, "images": [{"id": i} for i in (0, 1, 2)]}))
    records = [Record(i, partial(noise, i), ["here"]) for i in range(3)]
    captions = {0: "a dog", 1: "a person", 2: "a dog"}
    assert exact(3, Ratios(Chair(*files)(records, captions))) == {"CHAIRi": 1 / 3, "CHAIRs": 1 / 3}
    with pytest.raises(DataError, match=r"1 of 3 images, e\.g\. 7, are not in COCO's instances"):
        Chair(*files)([*records[:2], records[2]._replace(id=7)], {**captions, 7: "a dog"})


def test_beside_the_other_scores(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measure that cannot be used costs its own scores only."""
    without_java(monkeypatch)
    records = [Record(i, partial(noise, i), ["one two three"]) for i in range(3)]

    def words(records: list[Record], captions: dict) -> dict:
        return {"own_words": (np.array([len(captions[record.id].split()) for record in records], dtype=float), None)}

    measures = {"chair": Chair(*files), "words": words}
    evaluation = CaptionScores("mine", records, measures=measures)
    scores = evaluation.evaluate(make_model(), Settings(tmp_path))
    predictions = json.loads((tmp_path / "predictions" / "mine.json").read_text())
    assert scores["mine/own_words"] == pytest.approx(sum(len(row["caption"].split()) for row in predictions) / 3)
    assert {"mine/CHAIRs", "mine/own_words", "mine/CIDEr"} <= evaluation.draws.keys()
    elsewhere = CaptionScores("mine", [r._replace(id=f"x{r.id}") for r in records], measures=measures)
    assert "mine/own_words" in elsewhere.evaluate(make_model(), Settings(tmp_path))
    assert "annotated" in elsewhere.not_run["mine chair"]
