"""Questions about built-in scenes of two things: of colour, shape, number and place.

Only those with one clear answer are asked. Answers are balanced over questions of the same words, so that guessing
without looking at the image scores as little as the scenes allow (the idea of VQA v2).
"""

import random
from collections import Counter
from collections.abc import Iterator

from coca_lit.data.records import Record
from coca_lit.data.scenes.render import AXES, COLOURS, SHAPES, Scene, decode, scene_records
from coca_lit.models.presets import VOCABULARIES

KINDS = ("colour", "shape", "count", "place")
PEOPLE = 10  # identical answers to each question, for the accuracy of VQA
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
_WORDS = "0 1 2 are circles colour crosses how many rings shape squares stars thing things triangles what where"
VOCABULARY = [*VOCABULARIES["scenes"], *_WORDS.split()]  # in the order of the token ids


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
    scene = decode(number)
    rng = random.Random(f"questions {number}")
    thing, other = rng.sample(scene.things, 2)
    if thing.shape != other.shape:
        yield "colour", f"what colour is the {thing.shape}", thing.colour
    if thing.colour != other.colour:
        yield "shape", f"what shape is the {thing.colour} thing", thing.shape
    counted = _count(scene, rng)
    if counted is not None:
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
    by_colour = rng.random() < 0.5
    counts = Counter(thing.colour if by_colour else thing.shape for thing in scene.things)
    share_of_pairs = 1 / 8 if by_colour else 1 / 6  # of scenes, with two of a kind
    if max(counts.values()) == 2:
        answer = 2
    elif rng.random() < 2 * share_of_pairs / (1 - share_of_pairs):
        answer = rng.randrange(2)
    else:
        return None
    what = rng.choice([name for name in (COLOURS if by_colour else SHAPES) if counts[name] == answer])
    return f"{what} things" if by_colour else PLURALS[what], str(answer)
