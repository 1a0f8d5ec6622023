"""Which scores may be compared."""

import pytest

from coca_lit.metrics.uncertainty import Conditions
from coca_lit.tools.report.comparable import obstacle, other_data

USUAL = Conditions("test", 64, "a", 320, "b", {"generate.num_beams": 4, "rerank": 16})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (USUAL, ""),
        (USUAL._replace(split="renamed"), ""),  # the images are what counts
        (USUAL._replace(split="val", images=512, image_digest="c"), "64 images of test / 512 images of val"),
        (USUAL._replace(image_digest="c"), "not the same"),
        (USUAL._replace(texts=64, text_digest="c"), "320 / 64 texts"),
        (USUAL._replace(text_digest="c"), "not the same"),
        (USUAL._replace(settings={"rerank": 16}), "num_beams=4 / generate.num_beams=default"),
        (USUAL._replace(settings={**USUAL.settings, "rerank": 8}), "rerank=16 / rerank=8"),
        (None, "not record"),
    ],
)
def test_obstacles(other: Conditions | None, words: str) -> None:
    for found in (obstacle(USUAL, other), obstacle(other, USUAL)):
        assert bool(found) == bool(words)
    assert words in obstacle(USUAL, other)


def test_other_settings_are_of_the_same_data() -> None:
    assert other_data(USUAL, USUAL._replace(settings={})) == ""


def test_a_model_that_judges_itself_has_no_rival() -> None:
    own, given = (USUAL._replace(settings={"judge": judge}) for judge in (None, "clip.bin"))
    assert "judges itself" in obstacle(own, own)
    assert obstacle(own, given)
    assert obstacle(given, given) == ""
