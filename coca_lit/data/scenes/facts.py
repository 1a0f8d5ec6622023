"""What is true of a built-in scene: how much of a caption is, hallucination without a judge.

A caption states objects ("a circle"), attributes of objects ("small", "red") and relations: which two objects stand
beside each other, in which direction. The captions of a record state all of a scene's, and nothing else.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

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


class Count(NamedTuple):
    """Facts of one kind.

    Attributes:
        right: that the caption states and that are true.
        stated: that the caption states.
        true: that are true of the scene.
    """

    right: int
    stated: int
    true: int


def count_facts(stated: Statement, true: Statement) -> dict[str, Count]:
    """How many facts a caption has right, by kind: "object", "attribute" and "relation".

    Objects and attributes count as often as they are stated. A relation is true if some pair of neighbours, in that
    direction, is as both objects are described.
    """
    remaining = list(true.relations)
    right_relations = 0
    for first, second in stated.relations if stated.axis == true.axis else []:
        fitting = [pair for pair in remaining if first.fits(pair[0]) and second.fits(pair[1])]
        if fitting:
            remaining.remove(fitting[0])
            right_relations += 1
    return {
        "object": _count(stated.objects, true.objects),
        "attribute": _count(stated.attributes, true.attributes),
        "relation": Count(right_relations, len(stated.relations), len(true.relations)),
    }


def _count(stated: Counter[Any], true: Counter[Any]) -> Count:
    return Count((stated & true).total(), stated.total(), true.total())


def scene_facts(
    records: Sequence[Record], written: Mapping[int | str, str]
) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Precision and recall of objects, attributes and relations: "object_precision", …; see
    `coca_lit.evals.captions.Measure` and `count_facts`.
    """
    counts = [count_facts(statement(written[record.id]), statement(record.captions[0])) for record in records]
    parts: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    for kind in ("object", "attribute", "relation"):
        table = np.array([count[kind] for count in counts], dtype=np.float64).reshape(-1, 3)
        right, stated, true = table.T
        parts |= {f"{kind}_precision": (right, stated), f"{kind}_recall": (right, true)}
    return parts
