"""Questions about the built-in scenes whose answers are known: colour, shape, number and place.

A scene is asked only what it answers without doubt. Answers are spread evenly over questions of the same words, so
that somebody who never looks is right as seldom as the scenes allow (the idea of VQA v2).
"""

import random
from collections import Counter
from collections.abc import Iterator

from coca_lit.data.datamodule import CaptionDataModule
from coca_lit.data.records import Record
from coca_lit.data.scenes.render import AXES, COLOURS, SHAPES, Scene, decode, scene_records
from coca_lit.data.scenes.render import VOCABULARY as CAPTION_VOCABULARY
from coca_lit.data.text_batches import TextFiles
from coca_lit.data.transforms import TrainTransform, whole
from coca_lit.errors import DataError
from coca_lit.tokenizer import Tokenizer

KINDS = ("colour", "shape", "count", "place")
PEOPLE = 10  # all of one mind, for the accuracy of VQA
_PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
_WORDS = {"what", "colour", "shape", "is", "the", "thing", "things", "how", "many", "are", "there", "where"}
_WORDS |= {"0", "1", "2", "left", "right", "top", "bottom", *_PLURALS.values()}
# Words of captions first, so that their ids are those of the tokenizer "scenes".
VOCABULARY: tuple[str, ...] = (*CAPTION_VOCABULARY, *sorted(_WORDS - set(CAPTION_VOCABULARY)))


def scene_question_records(split: str, size: int = 32, count: int | None = None) -> list[Record]:
    """Records of questions about the scenes of a split of `scene_records`, whose arguments these are: `count` scenes.

    Ids are made as those of VQA, scene · 1000 + number of the question; the kind of the question is the domain.
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
    """What is counted, and how many there are. Two things are seldom of one colour or of one shape: then that is asked,
    and of other scenes just as many that the answers 0, 1 and 2 come equally often.
    """
    colours, shapes = Counter(t.colour for t in scene.things), Counter(t.shape for t in scene.things)
    by_colour = rng.random() < 0.5
    found = colours if by_colour else shapes
    pairs = 1 / 8 if by_colour else 1 / 6  # share of scenes with two of a kind
    if max(found.values()) == 2:
        answer = 2
    elif rng.random() < 2 * pairs / (1 - pairs):
        answer = rng.randrange(2)
    else:
        return None
    every = COLOURS if by_colour else SHAPES
    what = rng.choice([name for name in every if found[name] == answer])
    return f"{what} things" if by_colour else _PLURALS[what], str(answer)


class SceneQuestionsDataModule(CaptionDataModule):
    """Training on questions about scenes rendered at `image_size`.

    Args:
        train_count: number of training scenes; None takes the default of `scene_records`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        batch_size: int,
        image_size: int = 32,
        train_count: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        train_split: str = "train",
        val_split: str | None = "val",
        text: TextFiles | None = None,
        text_every: int = 2,
    ):
        splits = (train_split, val_split)
        super().__init__(tokenizer, batch_size, image_size, num_workers, seed, *splits, text, text_every)
        self.train_count = train_count

    def records(self, split: str) -> list[Record]:
        count = self.train_count if split == self.train_split else None
        try:
            return scene_question_records(split, self.image_size, count)
        except ValueError as error:
            raise DataError(f"data=scenes_vqa: {error}") from error

    def train_transform(self) -> TrainTransform:
        return whole  # a random crop could cut away what is asked about
