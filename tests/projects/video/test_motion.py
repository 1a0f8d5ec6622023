"""Moving scenes: what is drawn against where a shape has to be, and the reverse of a clip."""

from collections import Counter

import numpy as np
import pytest

from coca_lit.data.scenes.render import COLOURS
from coca_lit.projects.video.scenes import (
    COUNTS,
    Motion,
    MotionClip,
    motion_choice_records,
    motion_records,
)

RED, BLUE = ("red", "circle"), ("blue", "square")


def places(motion: Motion, colour: str, frames: int = 8) -> list[float]:
    """Where the pixels of a colour are from left to right, on average; NaN where there are none."""
    found = []
    for frame in MotionClip(motion, 3, frames, size=64).frames():
        near = np.abs(np.asarray(frame, int) - np.array(COLOURS[colour])).sum(axis=2) < 30
        found.append(near.nonzero()[1].mean() / 64 if near.any() else np.nan)
    return found


@pytest.mark.parametrize(
    ("event", "side", "begin", "end"),
    [
        ("moves", "right", 0.2, 0.8),
        ("moves", "left", 0.8, 0.2),
        ("passes", "right", 0.2, 0.8),
        ("passes", "left", 0.8, 0.2),
        ("enters", "left", None, 0.46),
        ("enters", "right", None, 0.54),
        ("leaves", "left", 0.46, None),
        ("leaves", "right", 0.54, None),
    ],
)
def test_what_happens(event: str, side: str, begin: float | None, end: float | None) -> None:
    motion = Motion(event, side, RED, BLUE)
    found = places(motion, "red")
    for place, expected in ((found[0], begin), (found[-1], end)):
        assert np.isnan(place) if expected is None else abs(place - expected) < 0.05
    seen = [place for place in found if not np.isnan(place)]
    to_right = (side == "right") == (event != "enters")
    assert seen == sorted(seen, reverse=not to_right)
    stays = places(motion, "blue")
    assert all(np.isnan(stays)) if event == "moves" else max(stays) - min(stays) < 1e-9


def test_each_clip_has_its_reverse() -> None:
    records = motion_records("test", frames=5)
    for first, second in zip(records[::2], records[1::2], strict=True):
        assert second.image.motion == first.image.motion.backwards()
        forwards, backwards = ([np.asarray(x) for x in record.image.frames()] for record in (first, second))
        np.testing.assert_array_equal(forwards, backwards[::-1])
        assert any((a != b).any() for a, b in zip(forwards, backwards, strict=True))
        np.testing.assert_array_equal(np.asarray(first.image()), np.asarray(second.image()))  # the middle one


def test_splits_share_no_text() -> None:
    texts = [record.captions[0] for split in COUNTS for record in motion_records(split, frames=1)]
    assert len(set(texts)) == len(texts) == sum(COUNTS.values())
    for split in ("trian", ""):
        with pytest.raises(ValueError, match="train, val, test"):
            motion_records(split, 1)
    with pytest.raises(ValueError, match="has 512 clips, got count=513"):
        motion_records("val", 1, count=513)


def test_choice_is_fair_without_the_clip() -> None:
    """In the two texts of "time" everything occurs equally often as right and as wrong one."""
    records = motion_choice_records("test", frames=1)
    kinds = Counter(record.domain for record in records)
    assert kinds["object"] == kinds["time"] == COUNTS["test"]
    assert kinds["side"] > 200 < kinds["mover"]
    right, wrong = (Counter(r.captions[i] for r in records if r.domain == "time") for i in (0, 1))
    assert right == wrong
    assert all(len(set(record.captions)) == 2 for record in records)
