"""Built-in clips, made from numbers: a coloured shape moves, enters, leaves or passes another one that stays.

Each clip is another one backwards: to enter from the left is, backwards, to leave to the left, and to pass to the left
is to pass to the right. Both have the same frames, so a model without their order is right in half of the cases in
which it has to choose between the two texts.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

from PIL import Image

from coca_lit.data.records import Record
from coca_lit.data.scenes.render import COLOURS, SHAPES, stamp
from coca_lit.models.presets import VOCABULARIES
from coca_lit.projects.video.clips import Clip

VOCABULARY = [*VOCABULARIES["scenes"], "enters", "leaves", "moves", "passes"]
SIDES = ("left", "right")
COUNTS = {"train": 9_000, "val": 512, "test": 512}
DIAMETER = 0.4  # of a shape, as a share of the picture


class Motion(NamedTuple):
    """What happens in a clip: something moves, passes, enters or leaves. `side`: to which it does, and from which it
    enters.
    """

    event: str
    side: str
    mover: tuple[str, str]  # colour and shape
    other: tuple[str, str]  # stays; not in the picture where something only moves

    def backwards(self) -> "Motion":
        if self.event in ("enters", "leaves"):
            return self._replace(event="leaves" if self.event == "enters" else "enters")
        return self._replace(side=opposite(self.side))

    def forwards(self) -> "Motion":
        """Of a motion and its backwards one the one that enters, or goes to the right."""
        ahead = self.event == "enters" or (self.event != "leaves" and self.side == "right")
        return self if ahead else self.backwards()

    def text(self) -> str:
        mover, other = (f"a {colour} {shape}" for colour, shape in (self.mover, self.other))
        if self.event == "moves":
            return f"{mover} moves to the {self.side}"
        if self.event == "passes":
            return f"{mover} passes {other} to the {self.side}"
        way = "enters from" if self.event == "enters" else "leaves to"
        return f"{mover} {way} the {self.side} below {other}"


def opposite(side: str) -> str:
    return "right" if side == "left" else "left"


@dataclass(frozen=True)
class MotionClip(Clip):
    """The clip of a motion; `seed` decides background and small shifts, which its backwards clip shares."""

    motion: Motion
    seed: int
    count: int
    size: int = 32

    def frames(self, count: int | None = None) -> Iterator[Image.Image]:
        event, side, mover, other = forwards = self.motion.forwards()
        count, rng = count or self.count, random.Random(self.seed)
        base, heights = rng.choice((16, 224)), [rng.uniform(-0.04, 0.04) for _ in range(2)]
        ground, place = tuple(base + int(24 * rng.random()) for _ in range(3)), rng.uniform(0.44, 0.56)
        for i in range(count) if forwards == self.motion else reversed(range(count)):
            image = Image.new("RGB", (self.size, self.size), ground)
            start, way = (-0.3, 0.8) if event == "enters" else (0.15, 0.7)
            x = start + way * (i + 0.5) / count
            x = 1 - x if (event, side) == ("enters", "right") else x
            self._draw(image, mover, x, (0.5 if event == "moves" else 0.74) + heights[0])
            if event != "moves":
                self._draw(image, other, place, 0.26 + heights[1])
            yield image

    def _draw(self, image: Image.Image, thing: tuple[str, str], x: float, y: float) -> None:
        colour, shape = thing
        mask = stamp(shape, round(self.size * DIAMETER))
        corner = (round(self.size * x - mask.width / 2), round(self.size * y - mask.height / 2))
        image.paste(COLOURS[colour], corner, mask)


def motion_records(split: str, frames: int, size: int = 32, count: int | None = None) -> list[Record]:
    """Clips of "train", "val" or "test", of which no text occurs in two, each with its text as caption.

    Args:
        frames: that a model sees of each clip.
        count: number of clips; by default those of `COUNTS`.

    Raises:
        ValueError: there is no such split, or it has fewer clips.
    """
    if split not in COUNTS:
        raise ValueError(f"moving scenes have the splits {', '.join(COUNTS)}, not {split!r}")
    held_out, pool = COUNTS["val"] + COUNTS["test"], _motions()
    begin = {"val": 0, "test": COUNTS["val"], "train": held_out}[split]
    most = len(pool) - held_out if split == "train" else COUNTS[split]
    count = COUNTS[split] if count is None else count
    if not 1 <= count <= most:
        raise ValueError(f"split {split!r} of moving scenes has {most} clips, got count={count}")
    return [
        Record(number, MotionClip(motion, number // 2, frames, size), motion.text())
        for number, motion in enumerate(pool[begin : begin + count], start=begin)
    ]


def motion_choice_records(split: str, frames: int, size: int = 32, count: int | None = None) -> list[Record]:
    """The text of clips and a wrong one, for `ChoiceScores`; the domain is what is wrong.

    - object: the shape that moves is another one.
    - mover: the shape that moves and the one that stays are exchanged.
    - side: it enters or leaves at the other side.
    - time: the clip runs backwards.
    """
    shapes, records = list(SHAPES), []
    for record in motion_records(split, frames, size, count):
        assert isinstance(record.image, MotionClip)
        motion = record.image.motion
        colour, shape = motion.mover
        wrong = {
            "object": motion._replace(mover=(colour, shapes[(shapes.index(shape) + 1) % len(shapes)])),
            "time": motion.backwards(),
        }
        if motion.event != "moves":
            wrong["mover"] = motion._replace(mover=motion.other, other=motion.mover)
        if motion.event in ("enters", "leaves"):
            wrong["side"] = motion._replace(side=opposite(motion.side))
        records += [
            Record(f"{record.id}/{kind}", record.image, (motion.text(), other.text()), kind)
            for kind, other in wrong.items()
        ]
    return records


@cache
def _motions() -> list[Motion]:
    """All motions in random order, each followed by its backwards one, in which everything occurs equally often."""
    things = list(product(COLOURS, SHAPES))
    pairs = [(a, b) for a, b in product(things, things) if a[0] != b[0] and a[1] != b[1]]
    rng = random.Random(2212)
    rng.shuffle(pairs)
    forwards = [Motion("moves", "left", thing, thing) for thing in things]
    forwards += [Motion("passes", "left", *pair) for pair in pairs]
    forwards += [Motion("enters", side, *pair) for side in SIDES for pair in pairs]
    rng.shuffle(forwards)
    return [motion for first in forwards for motion in (first, first.backwards())]
