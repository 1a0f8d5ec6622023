"""Questions about the built-in scenes whose answers are known: colour, shape, number and place.

Only questions with one clear answer are asked. Answers are balanced over questions of the same words, so that guessing
without looking at the image scores as little as the scenes allow (the idea of VQA v2).
"""

import random
from collections import Counter
from collections.abc import Iterator

from coca_lit.data.records import Record
from coca_lit.data.scenes.render import AXES, COLOURS, SHAPES, Scene, decode, scene_records
from coca_lit.data.scenes.render import VOCABULARY as CAPTION_VOCABULARY

KINDS = ("colour", "shape", "count", "place")
PEOPLE = 10  # identical answers to each question, for the accuracy of VQA
_PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
_WORDS = {"what", "colour", "shape", "is", "the", "thing", "things", "how", "many", "are", "there", "where"}
_WORDS |= {"0", "1", "2", "left", "right", "top", "bottom", *_PLURALS.values()}
# Words of captions first, so that they keep the ids of the tokenizer "scenes".
VOCABULARY: tuple[str, ...] = (*CAPTION_VOCABULARY, *sorted(_WORDS - set(CAPTION_VOCABULARY)))


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
    return f"{what} things" if by_colour else _PLURALS[what], str(answer)
