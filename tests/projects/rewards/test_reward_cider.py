"""CIDEr-D of single captions against pycocoevalcap, its words against the Penn Treebank's."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider

from coca_lit.metrics.java.runtime import ptb_tokenize
from coca_lit.projects.rewards.cider import CiderD, fast_words
from helpers.fuzzing import fuzz
from helpers.shared_data import CAPTIONS, fakecap

CAPTION = st.lists(st.sampled_from(["a", "dog", "runs", "on", "the", "grass", "zebra"]), max_size=12)
IMAGES = st.lists(st.tuples(CAPTION, st.lists(CAPTION, min_size=1, max_size=6)), min_size=2, max_size=20)


@fuzz
@given(IMAGES)
def test_scores_equal_pycocoevalcap(images: list[tuple[list[str], list[list[str]]]]) -> None:
    """Captions of every length, alone and among several; in any order of images and references."""
    images = [*images, (["a", "dog"], [["a", "dog", "runs"]])]  # theirs fails where all references are empty
    references = {i: group for i, (_, group) in enumerate(images)}
    texts = {i: [" ".join(words) for words in group] for i, group in references.items()}
    expected = Cider().compute_score(texts, {i: [" ".join(words)] for i, (words, _) in enumerate(images)})[1].tolist()
    scorer = CiderD(references)
    assert [scorer(i, [words])[0] for i, (words, _) in enumerate(images)] == pytest.approx(expected, abs=1e-9)
    samples = [words for words, _ in images]
    assert scorer(0, samples) == [scorer(0, [words])[0] for words in samples]
    turned = CiderD({i: group[::-1] for i, group in reversed(references.items())})
    assert turned(0, samples) == pytest.approx(scorer(0, samples), abs=1e-9)


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
