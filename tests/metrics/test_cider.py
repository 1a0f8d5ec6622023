"""CIDEr-D of single captions against pycocoevalcap, its words against the Penn Treebank's."""

import math
import random

import pytest
from pycocoevalcap.cider.cider import Cider

from coca_lit.metrics.cider import CiderD, fast_words
from coca_lit.metrics.java.runtime import ptb_tokenize
from helpers.shared_data import CAPTIONS, fakecap

WORDS = ["a", "dog", "runs", "on", "the", "green", "grass", "with", "red", "ball"]


def random_captions(count: int, seed: int) -> list[list[str]]:
    draw = random.Random(seed)
    return [draw.choices(WORDS, k=draw.randint(0, 12)) for _ in range(count)]


def official(references: dict, captions: dict) -> list[float]:
    texts = {image: [" ".join(words) for words in group] for image, group in references.items()}
    return Cider().compute_score(texts, {image: [" ".join(words)] for image, words in captions.items()})[1].tolist()


def test_scores_equal_pycocoevalcap() -> None:
    """Random captions of every length, empty ones too, with words that no reference has."""
    references = {i: random_captions(random.Random(i).randint(1, 6), i) for i in range(60)}
    captions = dict(enumerate([*random_captions(58, 99), ["zebra", "a"], []]))
    scorer = CiderD(references)
    found = [scorer(image, [captions[image]])[0] for image in references]
    assert found == pytest.approx(official(references, captions), abs=1e-9)
    assert max(found) > 1


def test_several_captions_of_an_image_are_scored_alone_and_again_alike() -> None:
    references = {i: random_captions(3, i) for i in range(9)}
    samples = random_captions(5, 7)
    scorer = CiderD(references)
    together = scorer(4, samples)
    assert together == [scorer(4, [words])[0] for words in samples] == CiderD(references)(4, samples)


def test_a_caption_by_hand() -> None:
    """Two images with a reference of one word each: only n = 1 counts, its cosine is 1, and a quarter of 10 is 2.5."""
    scorer = CiderD({"x": [["dog"]], "y": [["cat"]]})
    assert scorer("x", [["dog"], ["cat"], ["dog", "dog"]]) == pytest.approx([2.5, 0, 2.5 / 2 * math.exp(-1 / 72)])


@pytest.mark.skipif(not CAPTIONS.is_dir(), reason="shared caption data not present")
def test_words_are_nearly_those_of_the_treebank() -> None:
    texts = [text for references in fakecap()[0].values() for text in references]
    expected = [text.split() for text in ptb_tokenize(texts)]
    assert sum(fast_words(text) != words for text, words in zip(texts, expected, strict=True)) < 0.003 * len(texts)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A dog's red ball .", ["a", "dog", "'s", "red", "ball"]),
        (
            "He doesn't wear a T-shirt, he's 1.5 m",
            ["he", "does", "n't", "wear", "a", "t-shirt", "he", "'s", "1.5", "m"],
        ),
        ('  "Stop" -- sign; ', ["stop", "sign"]),
        ("", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert fast_words(text) == words
    assert [line.split() for line in ptb_tokenize([text])] == [words]
