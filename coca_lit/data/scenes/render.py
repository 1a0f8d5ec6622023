"""The built-in data set: images of coloured shapes in a row or a column with captions, made from numbers.

A scene number determines the shapes, their order, the captions and every pixel, so no file is needed and any machine
gets the same data. Every caption names all objects and their arrangement, which makes retrieval well posed: no two
scenes share a caption. The split "compositional" shows colour-shape pairs that no other split contains, although each
of its colours and shapes occurs in training.
"""

import math
import random
from collections.abc import Sequence
from functools import cache, partial
from itertools import product
from typing import NamedTuple

from PIL import Image, ImageDraw

from coca_lit.data.records import Record

Polygon = tuple[tuple[float, float], ...]


def _burst(points: int, inner: float = 1.0, outer: float = 1.0) -> Polygon:
    """Polygon from the top clockwise (y points down), its 2 * points corners at the radii outer, inner, outer, ..."""
    angles = (math.pi * i / points for i in range(2 * points))
    return tuple((r * math.sin(a), -r * math.cos(a)) for a, r in zip(angles, (outer, inner) * points, strict=True))


_CROSS: Polygon = (
    *((-0.34, -1.0), (0.34, -1.0), (0.34, -0.34), (1.0, -0.34), (1.0, 0.34), (0.34, 0.34)),
    *((0.34, 1.0), (-0.34, 1.0), (-0.34, 0.34), (-1.0, 0.34), (-1.0, -0.34), (-0.34, -0.34)),
)
SIZES = {"small": 0.52, "large": 0.86}  # diameter as a fraction of the object's share of the row or column
COLOURS = {
    "red": (226, 28, 36),
    "orange": (255, 134, 8),
    "yellow": (250, 222, 0),
    "green": (24, 148, 50),
    "cyan": (0, 204, 222),
    "blue": (36, 72, 240),
    "purple": (132, 36, 168),
    "pink": (255, 132, 196),
}
# Outlines in the square [-1, 1] x [-1, 1]: the first is filled, further ones are cut out of it.
SHAPES: dict[str, tuple[Polygon, ...]] = {
    "circle": (_burst(36),),
    "square": (((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),),
    "triangle": (((0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)),),
    "star": (_burst(5, inner=0.4),),
    "cross": (_CROSS,),
    "ring": (_burst(36), _burst(36, inner=0.52, outer=0.52)),
}
# Every colour and every shape stays in training; these six combinations do not.
HELD_OUT = frozenset(zip(("purple", "orange", "pink", "cyan", "green", "blue"), SHAPES, strict=True))

HELD_OUT_SCENES = 512  # size of val, of test, and by default of compositional
DEFAULT_COUNTS = {"train": 12_000, "val": HELD_OUT_SCENES, "test": HELD_OUT_SCENES, "compositional": HELD_OUT_SCENES}


class Thing(NamedTuple):
    """One object of a scene."""

    size: str
    colour: str
    shape: str


class Scene(NamedTuple):
    """Objects from left to right (axis "row") or from top to bottom (axis "column")."""

    axis: str
    things: tuple[Thing, ...]


class Wording(NamedTuple):
    """One way to describe a scene: `first` takes one object, `more` each further one; `backwards` starts at the end."""

    first: str
    more: str
    backwards: bool = False


THINGS = tuple(Thing(*attributes) for attributes in product(SIZES, COLOURS, SHAPES))
AXES = {
    "row": {
        "line": "row",
        "start": "left",
        "end": "right",
        "before": "to the left of",
        "after": "to the right of",
        "onward": "on the right",
        "heading": "right",
    },
    "column": {
        "line": "column",
        "start": "top",
        "end": "bottom",
        "before": "above",
        "after": "below",
        "onward": "underneath",
        "heading": "down",
    },
}
WORDINGS = (
    Wording("{thing}", " {before} {thing}"),
    Wording("{thing}", " {after} {thing}", backwards=True),
    Wording("there is {thing}", " and then {thing} {after} it"),
    Wording("from {start} to {end} {thing}", " then {thing}"),
    Wording("the picture shows {thing}", " followed {onward} by {thing}"),
    Wording("a {line} that starts at the {start} with {thing}", " and goes on with {thing}"),
    Wording("read from {end} to {start} it has {thing}", " before {thing}", backwards=True),
    Wording("we can see {thing}", " with {thing} {before} it", backwards=True),
    Wording("go {heading} from {thing}", " to reach {thing}"),
    Wording("at the {end} is {thing}", " preceded by {thing}", backwards=True),
)
STYLES = {"standard": WORDINGS[:5], "narrated": WORDINGS[5:]}


def space_size(objects: int) -> int:
    """Number of scenes with this many objects: 18,432 for 2."""
    if objects not in (2, 3):
        raise ValueError(f"scenes have 2 or 3 objects, got objects={objects!r}")
    return len(AXES) * len(THINGS) ** objects


def decode(number: int, objects: int = 2) -> Scene:
    """The scene of a number in range(space_size(objects)): a mixed-radix code of the axis and the objects."""
    if not 0 <= number < space_size(objects):
        raise ValueError(f"scene number must be in 0..{space_size(objects) - 1} for {objects} objects, got {number}")
    rest, axis = divmod(number, len(AXES))
    things = []
    for _ in range(objects):
        rest, thing = divmod(rest, len(THINGS))
        things.append(THINGS[thing])
    return Scene(tuple(AXES)[axis], tuple(things))


def encode(scene: Scene) -> int:
    """The number of a scene: the inverse of `decode`."""
    number = 0
    for thing in reversed(scene.things):
        number = number * len(THINGS) + THINGS.index(thing)
    return number * len(AXES) + tuple(AXES).index(scene.axis)


def captions(scene: Scene, wordings: Sequence[Wording] = STYLES["standard"]) -> tuple[str, ...]:
    """The scene in each of the wordings: lower-case words with one blank between them."""
    phrases = AXES[scene.axis]
    names = [f"a {' '.join(thing)}" for thing in scene.things]
    texts = []
    for wording in wordings:
        first, *others = reversed(names) if wording.backwards else names
        parts = [wording.first.format(thing=first, **phrases)]
        parts += [wording.more.format(thing=name, **phrases) for name in others]
        texts.append("".join(parts))
    return tuple(texts)


@cache
def stamp(shape: str, diameter: int) -> Image.Image:
    """Antialiased mask (mode L) of a shape, drawn 8 times larger and averaged."""
    scale = 8 * diameter / 2
    mask = Image.new("L", (8 * diameter, 8 * diameter))
    draw = ImageDraw.Draw(mask)
    for outline, fill in zip(SHAPES[shape], (255, 0), strict=False):
        draw.polygon([(scale * (1 + x), scale * (1 + y)) for x, y in outline], fill=fill)
    return mask.reduce(8)


def render(number: int, size: int = 32, objects: int = 2) -> Image.Image:
    """The scene as an RGB image of size x size pixels; its number also seeds the positions and the background."""
    background, things = layout(number, size, objects)
    image = Image.new("RGB", (size, size), background)
    for thing, corner, mask in things:
        image.paste(COLOURS[thing.colour], corner, mask)
    return image


def layout(
    number: int, size: int, objects: int = 2
) -> tuple[tuple[int, ...], list[tuple[Thing, tuple[int, int], Image.Image]]]:
    """The colour of the background; and each thing, with the corner and the mask by which it is drawn."""
    scene, rng = decode(number, objects), random.Random(number)
    base = rng.choice((16, 224))
    background = tuple(base + int(24 * rng.random()) for _ in range(3))
    things = []
    for place, thing in enumerate(scene.things):
        mask = stamp(thing.shape, max(1, round(size * SIZES[thing.size] / objects)))
        along = (place + rng.uniform(0.44, 0.56)) / objects
        across = rng.uniform(0.36, 0.64)  # little enough that a row never looks like a column
        x, y = (along, across) if scene.axis == "row" else (across, along)
        things.append((thing, (round(size * x - mask.width / 2), round(size * y - mask.height / 2)), mask))
    return background, things


@cache
def _pools(objects: int) -> dict[str, list[int]]:
    """Shuffled scene numbers of every split; val and test come first, so the size of train does not change them."""
    total = space_size(objects)
    # All scenes of two objects, and a sample of the 1.8 million with three.
    numbers = random.Random(2205).sample(range(total), min(total, 40_000))
    ordinary: list[int] = []
    novel: list[int] = []
    for number in numbers:
        unseen = any((thing.colour, thing.shape) in HELD_OUT for thing in decode(number, objects).things)
        (novel if unseen else ordinary).append(number)
    return {
        "val": ordinary[:HELD_OUT_SCENES],
        "test": ordinary[HELD_OUT_SCENES : 2 * HELD_OUT_SCENES],
        "train": ordinary[2 * HELD_OUT_SCENES :],
        "compositional": novel,
    }


@cache  # a run asks for the training captions several times
def _described(number: int, objects: int, style: str) -> tuple[str, ...]:
    return captions(decode(number, objects), STYLES[style])


def scene_records(
    split: str, size: int = 32, count: int | None = None, objects: int = 2, style: str = "standard"
) -> list[Record]:
    """Records of a split: "train", "val", "test" (disjoint scenes) or "compositional" (unseen colour-shape pairs).

    Args:
        size: height and width of the images in pixels.
        count: number of scenes; by default 12,000 for train and 512 for the others. A smaller count takes a prefix.
        objects: shapes in a scene, 2 or 3.
        style: of the captions: "standard", or "narrated", the same content in five other wordings.

    Raises:
        ValueError: unknown split or style, or more scenes than the split has.
    """
    if split not in DEFAULT_COUNTS:
        raise ValueError(f"unknown split {split!r} of scenes; known: {', '.join(DEFAULT_COUNTS)}")
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r} of captions; known: {', '.join(STYLES)}")
    pool = _pools(objects)[split]
    count = DEFAULT_COUNTS[split] if count is None else count
    if not 1 <= count <= len(pool):
        raise ValueError(f"split {split!r} of scenes has {len(pool)} scenes of {objects} objects, got count={count}")
    return [
        Record(number, partial(render, number, size, objects), _described(number, objects, style))
        for number in pool[:count]
    ]


def scene_training_captions(style: str = "standard") -> list[str]:
    """All captions of the training scenes."""
    return [caption for record in scene_records("train", style=style) for caption in record.captions]
