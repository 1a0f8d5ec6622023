"""CHAIR: objects that a caption names and the image does not show (Rohrbach et al. 2018, arXiv 1809.02156).

The rules follow the authors' code, github.com/LisaAnne/Hallucination, utils/chair.py:

- Two words that are one object count as one ("fire hydrant", "hot dog", "home plate"), "baby" and "adult" before an
  animal and "passenger" before "jet" and "train" are no persons.
- Where a caption has "toilet", "seat" is no chair.
- An object counts as often as it is named. An object is shown if it is annotated or named by a reference.

Two steps are not theirs. Words are split by a regular expression instead of NLTK. And a plural becomes a singular if
that is a word of the synonyms; the authors use the library pattern, which knows more plurals, and also cuts words that
are none, such as "tennis".
"""

import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
_DOUBLE = """motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light, fire hydrant,
stop sign, parking meter, suit case, sports ball, baseball bat, baseball glove, tennis racket, wine glass, hot dog,
cell phone, mobile phone, teddy bear, hair drier, potted plant, laptop computer, home plate"""
_ANIMALS = ["bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub"]
DOUBLE_WORDS = {
    **{words: words for words in " ".join(_DOUBLE.split()).split(", ")},
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
    "bow tie": "tie",
    "toilet seat": "toilet",
}
IRREGULAR = {
    "children": "child",
    "people": "person",
    "mice": "mouse",
    "geese": "goose",
    "teeth": "tooth",
    "feet": "foot",
}
ENDINGS = (("men", "man"), ("ves", "fe"), ("ves", "f"), ("ies", "y"), ("es", ""), ("s", ""))


class ObjectWords:
    """Finds the objects that a caption names.

    Args:
        synonyms: for each object its name and the other words for it; of a word in two groups the later one counts.
    """

    def __init__(self, synonyms: Sequence[Sequence[str]]) -> None:
        self.object_of = {word: group[0] for group in synonyms for word in group}
        self._known = {part for text in (*self.object_of, *DOUBLE_WORDS) for part in text.split()}

    def __call__(self, caption: str) -> list[str]:
        """The objects, each as often as it is named."""
        words = [self._singular(word) for word in WORD.findall(caption.lower())]
        joined: list[str] = []
        while words:
            double = DOUBLE_WORDS.get(" ".join(words[:2]))
            joined.append(double or words[0])
            words = words[2 if double else 1 :]
        if "toilet" in joined:
            joined = [word for word in joined if word != "seat"]
        return [self.object_of[word] for word in joined if word in self.object_of]

    def _singular(self, word: str) -> str:
        if word in self._known:
            return word
        others = [word[: -len(end)] + ending for end, ending in ENDINGS if word.endswith(end)]
        return next((other for other in (IRREGULAR.get(word, ""), *others) if other in self._known), word)


def chair(
    named: Sequence[Sequence[str]], shown: Sequence[Collection[str]]
) -> Mapping[str, tuple[np.ndarray, np.ndarray | None]]:
    """ "CHAIRi", the share of named objects that are not shown, and "CHAIRs", that of captions with such an object.

    Args:
        named: objects in the caption of each image.
        shown: objects in each image.

    Returns:
        For each score a number per image and what their sum is divided by, as `coca_lit.metrics.uncertainty.ratios`
        takes them.
    """
    absent = [sum(word not in there for word in words) for words, there in zip(named, shown, strict=True)]
    counts, words = np.array(absent, dtype=np.float64), np.array([*map(len, named)], dtype=np.float64)
    return {"CHAIRi": (counts, words), "CHAIRs": ((counts > 0).astype(np.float64), None)}
