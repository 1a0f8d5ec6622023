"""Questions about places in the built-in scenes, and the words of the answers."""

from coca_lit.data.records import Record
from coca_lit.data.scenes.render import decode, layout, scene_records
from coca_lit.distributed import stable_seed
from coca_lit.models.presets import VOCABULARIES
from coca_lit.projects.places.boxes import BINS, box_text

KINDS = ("caption", "where", "what")
# Of these words, questions about places have few. The others are kept for the token ids of trained models.
_WORDS = "0 1 2 are circles colour crosses how many rings shape squares stars thing things triangles what where"
_FURTHER_EDGES = [str(edge) for edge in range(3, BINS + 1)]
VOCABULARY = [*VOCABULARIES["scenes"], *_WORDS.split(), *_FURTHER_EDGES]  # in the order of the token ids


def scene_place_records(split: str, size: int = 32, count: int | None = None) -> list[Record]:
    """Three records of each of `count` scenes, with the arguments of `scene_records`: its captions; "where is a large
    red circle", whose answer is a box such as "<3 5 14 16>"; and "what is at <3 5 14 16>". The kind is the domain. A
    scene of two equal things has no questions.
    """
    caption, where, what = KINDS
    records = []
    for scene in scene_records(split, size, count):
        number = int(scene.id)
        records.append(scene._replace(id=f"{number}/{caption}", domain=caption))
        things = decode(number).things
        if len(set(things)) < len(things):
            continue
        names = [f"a {' '.join(thing)}" for thing in things]
        places = [box_text(box, size) for box in boxes_of_things(number, size)]
        first = stable_seed("place", number) % len(things)  # the questions are about another thing each
        second = 1 - first
        records += [
            Record(f"{number}/{where}", scene.image, places[first], where, f"where is {names[first]}"),
            Record(f"{number}/{what}", scene.image, names[second], what, f"what is at {places[second]}"),
        ]
    return records


def scene_place_questions(split: str, size: int = 32, count: int | None = None) -> list[Record]:
    """The questions among `scene_place_records`."""
    return [record for record in scene_place_records(split, size, count) if record.question]


def boxes_of_things(number: int, size: int = 32) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom edge of each thing of a scene of two in pixels, in the order of the scene."""
    _, things = layout(number, size)
    boxes = []
    for _, (x, y), mask in things:
        left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
        boxes.append(
            (_within(left + x, size), _within(top + y, size), _within(right + x, size), _within(bottom + y, size))
        )
    return boxes


def _within(edge: int, size: int) -> int:
    return min(max(edge, 0), size)
