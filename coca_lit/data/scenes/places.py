"""Places in built-in scenes as texts (LocCa: Wan et al. 2024, arXiv 2403.19596): the box of a thing that is named, and
the name of the thing in a box. The model reads and writes boxes as words, the edges in 32nds of the image.
"""

import re

from coca_lit.data.records import Record
from coca_lit.data.scenes.render import boxes, decode, scene_records
from coca_lit.distributed import stable_seed

BINS = 32
KINDS = ("caption", "where", "what")

Edges = tuple[float, float, float, float]
"""Left, top, right and bottom edge of a box."""


def scene_place_records(split: str, size: int = 32, count: int | None = None) -> list[Record]:
    """Three records of each of `count` scenes, with the arguments of `scene_records`: its captions; "where is a large
    red circle", whose answer is a box such as "<3 5 14 16>"; and "what is at <3 5 14 16>". The kind is the domain. A
    scene of two equal things has no questions.
    """
    records = []
    for scene in scene_records(split, size, count):
        number = int(scene.id)
        records.append(scene._replace(id=f"{number}/{KINDS[0]}", domain=KINDS[0]))
        things = decode(number).things
        if len(set(things)) == len(things):  # the questions are about another thing each, drawn by the number
            first = stable_seed("place", number) % len(things)
            names = [f"a {' '.join(thing)}" for thing in things]
            places = [box_text(box, size) for box in boxes(number, size)]
            _, where, what = KINDS
            records.append(Record(f"{number}/{where}", scene.image, places[first], where, f"where is {names[first]}"))
            records.append(
                Record(f"{number}/{what}", scene.image, names[1 - first], what, f"what is at {places[1 - first]}")
            )
    return records


def scene_place_questions(split: str, size: int = 32, count: int | None = None) -> list[Record]:
    """The questions among `scene_place_records`."""
    return [record for record in scene_place_records(split, size, count) if record.question]


def box_text(box: Edges, size: int) -> str:
    """The box in an image of that size, as the model writes it: (3, 5, 14, 16) of 32 pixels -> "<3 5 14 16>"."""
    return f"<{' '.join(str(round(edge * BINS / size)) for edge in box)}>"


def read_box(text: str) -> Edges | None:
    """The box that a text states, in 32nds of the image; None if it is not four numbers."""
    words = re.findall(r"[^\s<>]+", text)
    if len(words) != 4 or not all(re.fullmatch(r"\d{1,4}", word) for word in words):
        return None
    left, top, right, bottom = map(float, words)
    return left, top, right, bottom


def overlap(one: Edges, other: Edges) -> float:
    """Intersection over union of two boxes; 0 for an empty box."""
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    both = max(width, 0) * max(height, 0)
    areas = [max(box[2] - box[0], 0) * max(box[3] - box[1], 0) for box in (one, other)]
    return both / (sum(areas) - both) if both else 0.0
