"""What captions look like, without references: their length and how varied they are."""

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def caption_statistics(captions: Collection[str]) -> dict[str, float]:
    """Mean number of words, number of different words, and distinct-1 and -2 (Li et al. 2016, arXiv 1510.03055).

    Distinct-n is the number of different n-grams over the number of all of them; long texts and large sets lower it, so
    it compares models on the same images only.
    """
    texts = [WORD.findall(caption.lower()) for caption in captions]
    words = [word for text in texts for word in text]
    pairs = [pair for text in texts for pair in pairwise(text)]
    return {
        "mean_length": len(words) / max(len(texts), 1),
        "vocabulary": float(len(set(words))),
        "distinct_1": _distinct(words),
        "distinct_2": _distinct(pairs),
    }


def are_novel(captions: Iterable[str], training_captions: Collection[str]) -> list[bool]:
    """Whether each caption differs from all training captions in a word."""
    known = {tuple(WORD.findall(text.lower())) for text in training_captions}
    return [tuple(WORD.findall(text.lower())) not in known for text in captions]


def _distinct(ngrams: Sequence[object]) -> float:
    return len(set(ngrams)) / max(len(ngrams), 1)
