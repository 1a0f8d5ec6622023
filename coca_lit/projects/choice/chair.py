"""CHAIR of captions of MS-COCO: objects that a caption names and the image does not show (Rohrbach et al. 2018, arXiv
1809.02156), as a measure of `CaptionScores`.

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
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from coca_lit.data.datasets.annotations import MAX_BYTES, check_id, find_file, schema
from coca_lit.data.records import Listing, Record
from coca_lit.errors import DataError
from coca_lit.metrics.uncertainty import Parts
from coca_lit.reading import open_regular, read_json

MAX_SYNONYMS = 2**20  # bytes
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


class Chair:
    """Objects that captions name and images do not show: "CHAIRi" of the objects, "CHAIRs" of the captions.

    Args:
        synonyms: the file synonyms.txt of the authors: a line for each object, its name and other words for it,
            separated by commas.
        instances: COCO's instances_val2014.json, or several such files: {"categories": [{id, name}], "annotations":
            [{image_id, category_id}]}.

    Raises:
        DataNotFoundError: a file does not exist.
        DataError: a file cannot be used.
    """

    def __init__(self, synonyms: str | Path, instances: str | Path | Sequence[str | Path]) -> None:
        files = [Path(file) for file in ([instances] if isinstance(instances, str | Path) else instances)]
        how = "CHAIR needs synonyms.txt of github.com/LisaAnne/Hallucination and COCO's instances_val2014.json"
        words = Path(synonyms)
        for path in (words, *files):
            find_file("a file of CHAIR", [path], how)
        try:
            with open_regular(words) as file:
                text = file.read(MAX_SYNONYMS + 1).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{words} cannot be read: {error}") from error
        groups = [[word.strip() for word in line.split(",") if word.strip()] for line in text.splitlines()]
        if len(text) > MAX_SYNONYMS or not any(groups):
            raise DataError(f"{words} must hold a line for each object, its name and other words for it")
        self.objects_in = ObjectWords([group for group in groups if group])
        self.annotated: dict[int | str, set[str]] = defaultdict(set)
        self.covered: set[int | str] | None = set()  # images of the files; None if one does not list them
        for path in files:
            content = read_json(path, dict, MAX_BYTES)
            with schema(path, "COCO's instances"):
                names = {category["id"]: category["name"] for category in content["categories"]}
                if unknown := [name for name in names.values() if name not in self.objects_in.object_of]:
                    raise DataError(f"the synonyms have no word for the object {unknown[0]!r:.80} of {path}")
                objects = {id: self.objects_in.object_of[name] for id, name in names.items()}
                if self.covered is not None and "images" in content:
                    self.covered |= {check_id(image["id"]) for image in content["images"]}
                else:
                    self.covered = None
                for annotation in content["annotations"]:
                    self.annotated[check_id(annotation["image_id"])].add(objects[annotation["category_id"]])

    def __call__(self, records: Sequence[Record | Listing], captions: Mapping[int | str, str]) -> Parts:
        """See `coca_lit.evals.captions.Measure`; DataError if no image is annotated, or the files do not list one."""
        if not any(record.id in self.annotated for record in records):
            raise DataError("none of the images is annotated in COCO's instances: are the ids those of COCO?")
        if self.covered is not None and (bare := [record.id for record in records if record.id not in self.covered]):
            raise DataError(
                f"{len(bare)} of {len(records)} images, e.g. {bare[0]!r}, are not in COCO's instances: name all files"
            )
        named = [self.objects_in(captions[record.id]) for record in records]
        shown = [
            self.annotated.get(record.id, set()).union(*map(self.objects_in, record.captions)) for record in records
        ]
        return chair(named, shown)


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


def chair(named: Sequence[Sequence[str]], shown: Sequence[Collection[str]]) -> Parts:
    """ "CHAIRi", the share of named objects that are not shown, and "CHAIRs", that of captions with such an object.

    Args:
        named: objects in the caption of each image.
        shown: objects in each image.

    Returns:
        For each score a number per image and what their sum is divided by, as `coca_lit.metrics.uncertainty.Ratios`
        takes them.
    """
    absent = [sum(word not in there for word in words) for words, there in zip(named, shown, strict=True)]
    counts, words = np.array(absent, dtype=np.float64), np.array([*map(len, named)], dtype=np.float64)
    return {"CHAIRi": (counts, words), "CHAIRs": ((counts > 0).astype(np.float64), None)}
