"""What is true of a built-in scene: how much of a caption is, hallucination without a judge; and questions with known
answers.

A caption states objects ("a circle"), attributes of objects ("small", "red") and relations: which two objects stand
beside each other, in which direction. The captions of a record state all of a scene's, and nothing else.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from coca_lit.data.records import Record
from coca_lit.data.scenes.render import (
    AXES,
    COLOURS,
    SHAPES,
    SIZES,
    WORDINGS,
    Scene,
    Thing,
    captions,
    decode,
    scene_records,
)

_THING = re.compile(rf"\ba ((?:(?:{'|'.join([*SIZES, *COLOURS])}) )*)({'|'.join(SHAPES)})\b")


class Mention(NamedTuple):
    """An object in a caption."""

    shape: str
    attributes: tuple[str, ...]

    def fits(self, other: "Mention") -> bool:
        """Whether all that is said of this one is true of the other."""
        return self.shape == other.shape and set(self.attributes) <= set(other.attributes)


class Statement(NamedTuple):
    """What a caption states.

    Attributes:
        things: from left to right or from top to bottom, if there is an axis; else as they come.
        axis: "row" or "column"; None if the words around the objects match no wording, and state no relation.
    """

    things: tuple[Mention, ...]
    axis: str | None

    @property
    def relations(self) -> list[tuple[Mention, Mention]]:
        """Neighbours along the axis."""
        return list(zip(self.things, self.things[1:], strict=False)) if self.axis else []

    @property
    def objects(self) -> Counter[str]:
        return Counter(thing.shape for thing in self.things)

    @property
    def attributes(self) -> Counter[tuple[str, str]]:
        return Counter((thing.shape, attribute) for thing in self.things for attribute in thing.attributes)


def statement(caption: str) -> Statement:
    """The facts that a caption states."""
    text = " ".join(caption.lower().split())
    things = tuple(Mention(shape, tuple(words.split())) for words, shape in _THING.findall(text))
    axis, backwards = _frames(len(things)).get(_THING.sub("*", text), (None, False))
    return Statement(things[::-1] if backwards else things, axis)


@cache
def _frames(count: int) -> dict[str, tuple[str, bool]]:
    """The words around `count` objects -> axis, and whether the last object comes first."""
    thing = Thing("s", "c", "t")
    return {
        captions(Scene(axis, (thing,) * count), [wording])[0].replace("a s c t", "*"): (axis, wording.backwards)
        for wording in WORDINGS
        for axis in AXES
        if count
    }


def scene_facts(
    records: Sequence[Record], written: Mapping[int | str, str]
) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Precision and recall of objects, attributes and relations: "object_precision", …; see
    `coca_lit.evals.captions.Measure`.

    Objects and attributes count as often as they are stated. A relation is true if some pair of neighbours, in that
    direction, is as both objects are described.
    """
    rows: list[tuple[int, int, int]] = []
    for record in records:
        stated, true = statement(written[record.id]), statement(record.captions[0])
        left, found = list(true.relations), 0
        for first, second in stated.relations if stated.axis == true.axis else []:
            fitting = [pair for pair in left if first.fits(pair[0]) and second.fits(pair[1])]
            if fitting:
                left.remove(fitting[0])
                found += 1
        rows += [
            ((stated.objects & true.objects).total(), stated.objects.total(), true.objects.total()),
            ((stated.attributes & true.attributes).total(), stated.attributes.total(), true.attributes.total()),
            (found, len(stated.relations), len(true.relations)),
        ]
    table = np.array(rows, dtype=np.float64).reshape(-1, 3, 3)  # (images, kind of fact, true and stated or all)
    parts: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    for i, fact in enumerate(("object", "attribute", "relation")):
        both, said, there = table[:, i].T
        parts |= {f"{fact}_precision": (both, said), f"{fact}_recall": (both, there)}
    return parts


# Questions of colour, shape, number and place. Only those with one clear answer are asked. Answers are balanced over
# questions of the same words, so that guessing without looking at the image scores as little as the scenes allow (the
# idea of VQA v2).

KINDS = ("colour", "shape", "count", "place")
PEOPLE = 10  # identical answers to each question, for the accuracy of VQA
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}


def scene_question_records(split: str, size: int = 32, count: int | None = None) -> list[Record]:
    """Records of questions about `count` scenes of a split, with the arguments of `scene_records`.

    Ids are made as in VQA, scene · 1000 + number of the question; the kind of the question is the domain.
    """
    records = []
    for scene in scene_records(split, size, count):
        for kind, question, answer in questions(int(scene.id)):
            id = int(scene.id) * 1000 + KINDS.index(kind)
            records.append(Record(id, scene.image, (answer,) * PEOPLE, kind, question))
    return records


def questions(number: int) -> Iterator[tuple[str, str, str]]:
    """(kind, question, answer) of a scene of two things; at most one question of each kind."""
    scene, rng = decode(number), random.Random(f"questions {number}")
    thing, other = rng.sample(scene.things, 2)
    if thing.shape != other.shape:
        yield "colour", f"what colour is the {thing.shape}", thing.colour
    if thing.colour != other.colour:
        yield "shape", f"what shape is the {thing.colour} thing", thing.shape
    if (counted := _count(scene, rng)) is not None:
        what, answer = counted
        yield "count", f"how many {what} are there", answer
    if thing[1:] != other[1:]:
        ends = AXES[scene.axis]
        place = ends["start"] if thing == scene.things[0] else ends["end"]
        yield "place", f"where is the {thing.colour} {thing.shape}", place


def _count(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """What is counted, and how many there are. Few scenes have two things of one colour or shape, and all of them are
    asked; of the others just enough that the answers 0, 1 and 2 are equally frequent.
    """
    colours, shapes = Counter(t.colour for t in scene.things), Counter(t.shape for t in scene.things)
    by_colour = rng.random() < 0.5
    found = colours if by_colour else shapes
    pairs = 1 / 8 if by_colour else 1 / 6  # fraction of scenes with two of a kind
    if max(found.values()) == 2:
        answer = 2
    elif rng.random() < 2 * pairs / (1 - pairs):
        answer = rng.randrange(2)
    else:
        return None
    every = COLOURS if by_colour else SHAPES
    what = rng.choice([name for name in every if found[name] == answer])
    return f"{what} things" if by_colour else PLURALS[what], str(answer)
