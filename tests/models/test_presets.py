"""The word lists of the presets match the data that they are for."""

import pytest

from coca_lit.data.scenes import questions, render
from coca_lit.models import create_model
from coca_lit.models.presets import VOCABULARIES


@pytest.mark.parametrize(
    ("name", "words"),
    [("scenes", render.VOCABULARY), ("scenes_vqa", questions.VOCABULARY)],
    ids=["scenes", "scenes_vqa"],
)
def test_vocabulary_of_the_scenes(name: str, words: tuple[str, ...]) -> None:
    assert VOCABULARIES[name] == list(words)
    assert create_model("coca_tiny", tokenizer=name).tokenizer.spec == list(words)


def test_an_unknown_vocabulary_suggests_one() -> None:
    with pytest.raises(ValueError, match="unknown tokenizer 'scenes_vka'; did you mean 'scenes_vqa'"):
        create_model("coca_tiny", tokenizer="scenes_vka")
