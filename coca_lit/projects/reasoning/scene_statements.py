"""Statements about built-in scenes whose truth is known: about one scene of which a thing is covered, which entails a
statement, contradicts it or leaves it open; and about two scenes, true or false.

They come in blocks of scenes and texts: every scene of a block has one text of each label, and every text one scene of
each label. Whoever sees only the text, or only the images, is therefore right by chance alone, exactly and not just on
average. Blocks are made of scene numbers, of which each split has its own.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from PIL import Image

from coca_lit.data.records import Record
from coca_lit.data.scenes.render import AXES, COLOURS, SHAPES, SIZES, Scene, Thing, decode, encode, render
from coca_lit.distributed import stable_seed
from coca_lit.projects.reasoning import scene_questions
from coca_lit.projects.reasoning.scene_questions import PLURALS

LABELS = ("contradiction", "entailment", "neutral")
TRUTHS = ("false", "true")
_WORDS = "both contradiction entailment false in least middle more neutral one only pictures show true two"
VOCABULARY = [*scene_questions.VOCABULARY, *_WORDS.split()]  # in the order of the token ids
OBJECTS = 3
BOARD = (128, 128, 128)
COUNTS = {"train": 12_000, "val": 600, "test": 600}  # of scenes, or pairs of scenes
HELD_OUT = {0: "val", 1: "test"}  # of ten scenes, by a hash of their number; the others are for training

_PLACES = {
    "row": ("on the left", "in the middle", "on the right"),
    "column": ("at the top", "in the middle", "at the bottom"),
}
_SIDES = ("on the left", "on the right")


class Shown(NamedTuple):
    """A scene, by its number, and the place of the thing that is covered, if one is."""

    number: int
    covered: int | None = None


class Case(NamedTuple):
    """What is shown in a place of a block, and the texts about it, each with its label."""

    shown: tuple[Shown, ...]
    texts: tuple[tuple[str, str], ...]


Choice = tuple[Sequence[str], Sequence[str]]  # the colours and the shapes that a thing may have
Draw = Callable[[str, Sequence[Choice]], int]  # axis and things of a scene -> its number


def entailment_records(split: str, size: int = 48, count: int | None = None) -> list[Record]:
    """One scene of three things, one of them covered, and a statement (`question`); its label, one of `LABELS`, is the
    caption: a statement is entailed if it is true whatever is covered, and contradicted if it is false whatever is.
    Kinds, the domains: "colour" of a place, "count" (at least two of a kind), "relation" of two colours.

    Args:
        split: "train", "val" or "test", disjoint scenes.
        size: height and width of the images in pixels.
        count: number of scenes at least, up to the end of a block; 12,000 for train and 600 for the others.

    Raises:
        ValueError: unknown split, or a count below 1.
    """
    return _records({"colour": _colour, "count": _count, "relation": _relation}, split, size, count)


def comparison_records(split: str, size: int = 48, count: int | None = None) -> list[Record]:
    """Two scenes of three things, of which the second is in `further`, and a statement that is "true" or "false".
    Kinds: "more" things of a kind on one side, "both" pictures show one, only "one" picture does.

    Arguments and errors as of `entailment_records`; the count is of pairs.
    """
    both, one = (partial(_in_pictures, in_both=in_both) for in_both in (True, False))
    return _records({"more": _more, "both": both, "one": one}, split, size, count)


def show(number: int, covered: int | None, size: int = 48) -> Image.Image:
    """The scene with a grey board over one of its things, as wide as its share of the row or column."""
    image = render(number, size, OBJECTS)
    if covered is not None:
        start, end = (round(size * place / OBJECTS) for place in (covered, covered + 1))
        in_row = decode(number, OBJECTS).axis == "row"
        image.paste(BOARD, (start, 0, end, size) if in_row else (0, start, size, end))
    return image


def _records(
    kinds: Mapping[str, Callable[[random.Random, Draw], list[Case]]], split: str, size: int, count: int | None
) -> list[Record]:
    if split not in COUNTS:
        raise ValueError(f"unknown split {split!r} of statements about scenes; known: {', '.join(COUNTS)}")
    count = COUNTS[split] if count is None else count
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    rng = random.Random(f"{' '.join(kinds)} {split}")
    records: list[Record] = []
    cases = dict.fromkeys(kinds, 0)
    while sum(cases.values()) < count:
        kind = min(cases, key=cases.__getitem__)
        for case in kinds[kind](rng, partial(_drawn, rng, split)):
            image, *further = (partial(show, *shown, size) for shown in case.shown)
            for i, (text, label) in enumerate(case.texts):
                records.append(Record(f"{kind}/{cases[kind]}/{i}", image, label, kind, text, further))
            cases[kind] += 1
    return records


def _drawn(rng: random.Random, split: str, axis: str, choices: Sequence[Choice]) -> int:
    """A random scene of the split, with these things along this axis."""
    while True:
        things = (Thing(rng.choice([*SIZES]), rng.choice(colours), rng.choice(shapes)) for colours, shapes in choices)
        number = encode(Scene(axis, tuple(things)))
        if HELD_OUT.get(stable_seed("statements", number) % 10, "train") == split:
            return number


# Entailment. Each function draws a block.


def _colour(rng: random.Random, draw: Draw) -> list[Case]:
    """Three scenes, in each of which another place is covered; text i is about place i, which scene i covers."""
    axis = rng.choice([*AXES])
    named = [rng.choice([*COLOURS]) for _ in range(OBJECTS)]
    texts = [f"the thing {_PLACES[axis][place]} is {colour}" for place, colour in enumerate(named)]
    cases = []
    for i in range(OBJECTS):
        labels = {i: "neutral", (i - 1) % OBJECTS: "entailment", (i + 1) % OBJECTS: "contradiction"}
        fitting = {
            "entailment": lambda name: [name],
            "contradiction": lambda name: _others(COLOURS, name),
            "neutral": lambda _: [*COLOURS],
        }
        choices = [_colours(fitting[labels[place]](named[place])) for place in range(OBJECTS)]
        shown = Shown(draw(axis, choices), covered=i)
        cases.append(Case((shown,), tuple((texts[place], labels[place]) for place in range(OBJECTS))))
    return cases


def _count(rng: random.Random, draw: Draw) -> list[Case]:
    """Two colours and two shapes: in four scenes one of the four is what the visible things share, while one of them
    has the shape or colour beside it.
    """
    colours, shapes = rng.sample([*COLOURS], 2), rng.sample([*SHAPES], 2)
    text = {name: f"there are at least two {_plural(name)}" for name in (*colours, *shapes)}
    cases = []
    for i in (0, 1):
        colour, shape, other = colours[i], shapes[i], 1 - i
        pairs = {
            (colour, shape, colours[other]): [([colour], [shape]), ([colour], _others(SHAPES, shape))],
            (shape, colour, shapes[other]): [([colour], [shape]), (_others(COLOURS, colour), [shape])],
        }
        for (shared, once, absent), visible in pairs.items():
            covered = rng.randrange(OBJECTS)
            rng.shuffle(visible)
            visible.insert(covered, ([*COLOURS], [*SHAPES]))
            shown = Shown(draw(rng.choice([*AXES]), visible), covered)
            labels = ((shared, "entailment"), (once, "neutral"), (absent, "contradiction"))
            cases.append(Case((shown,), tuple((text[name], label) for name, label in labels)))
    return cases


def _relation(rng: random.Random, draw: Draw) -> list[Case]:
    """Three colours, of which each of six scenes has two, in one order, on both sides of what is covered. The text that
    stays open is about the first of them and the third colour, in that order.
    """
    axis, (a, b, c) = rng.choice([*AXES]), rng.sample([*COLOURS], 3)
    before, cases = AXES[axis]["before"], []
    for first, last, third in ((a, b, c), (b, c, a), (c, a, b), (b, a, c), (a, c, b), (c, b, a)):
        shown = Shown(draw(axis, [_colours([first]), _colours([*COLOURS]), _colours([last])]), covered=1)
        pairs = {(first, last): "entailment", (last, first): "contradiction", (first, third): "neutral"}
        texts = ((f"a {one} thing is {before} a {other} thing", label) for (one, other), label in pairs.items())
        cases.append(Case((shown,), tuple(texts)))
    return cases


# Comparisons. Each function draws a block of two pairs, in which two texts are true and false, and false and true.


def _more(rng: random.Random, draw: Draw) -> list[Case]:
    """Of one kind of thing on either side; or of two kinds on one side, where there are equally many of the other."""
    side = rng.randrange(2)
    one, other = _two_kinds(rng)
    text = "there are more {} {}".format
    if rng.random() < 0.5:
        few, many = rng.choice(((0, 1), (0, 2), (1, 2), (1, 3), (2, 3)))
        counts = [({one: many}, {one: few}), ({one: few}, {one: many})]
        texts = [text(_plural(one), _SIDES[side]), text(_plural(one), _SIDES[1 - side])]
    else:
        few, many = rng.choice(((0, 1), (1, 2), (0, 2)))
        counts = [({one: many, other: 1}, {one: few, other: 1}), ({other: many, one: 1}, {other: few, one: 1})]
        texts = [text(_plural(kind), _SIDES[side]) for kind in (one, other)]
    return _opposites(rng, draw, [pair if side == 0 else pair[::-1] for pair in counts], texts)


def _in_pictures(rng: random.Random, draw: Draw, in_both: bool) -> list[Case]:
    """Two kinds of things, one of which is in both pictures and the other in one of them."""
    counts = []
    kinds = _two_kinds(rng)
    for common, rare in (kinds, kinds[::-1]) if in_both else (kinds[::-1], kinds):
        pair = [{common: rng.choice((1, 2)), rare: 1}, {common: rng.choice((1, 2, 3))}]
        rng.shuffle(pair)
        counts.append((pair[0], pair[1]))
    what = "both pictures show a" if in_both else "only one picture shows a"
    texts = [f"{what} {kind}" if kind in SHAPES else f"{what} {kind} thing" for kind in kinds]
    return _opposites(rng, draw, counts, texts)


def _opposites(
    rng: random.Random, draw: Draw, counts: Sequence[tuple[Mapping[str, int], Mapping[str, int]]], texts: Sequence[str]
) -> list[Case]:
    """The first text is true of the first pair, the second of the second, and neither of the other pair.

    Args:
        counts: of each pair, how many things of a kind its two scenes have; further things are of other kinds.
    """
    named = {kind for pair in counts for scene in pair for kind in scene}
    every = COLOURS if named <= COLOURS.keys() else SHAPES
    others = [kind for kind in every if kind not in named]
    cases = []
    for i, pair in enumerate(counts):
        shown = []
        for scene in pair:
            things = [kind for kind, count in scene.items() for _ in range(count)]
            things += [rng.choice(others) for _ in range(OBJECTS - len(things))]
            rng.shuffle(things)
            choices = [_colours([kind]) if every is COLOURS else ([*COLOURS], [kind]) for kind in things]
            shown.append(Shown(draw(rng.choice([*AXES]), choices)))
        cases.append(Case(tuple(shown), tuple((text, TRUTHS[j == i]) for j, text in enumerate(texts))))
    return cases


def _two_kinds(rng: random.Random) -> list[str]:
    """Two colours or two shapes."""
    return rng.sample([*rng.choice((COLOURS, SHAPES))], 2)


def _colours(colours: Sequence[str]) -> Choice:
    return colours, [*SHAPES]


def _others(names: Mapping[str, object], name: str) -> list[str]:
    return [other for other in names if other != name]


def _plural(name: str) -> str:
    return PLURALS.get(name, f"{name} things")
