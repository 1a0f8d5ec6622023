"""CHAIR of captions of MS-COCO, as a measure of `CaptionScores`."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from coca_lit.data.datasets.annotations import MAX_BYTES, check_id, find_file, schema
from coca_lit.data.records import Listing, Record
from coca_lit.errors import DataError
from coca_lit.metrics.chair import ObjectWords, chair
from coca_lit.reading import open_regular, read_json

MAX_SYNONYMS = 2**20  # bytes


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
        for path in (Path(synonyms), *files):
            find_file("a file of CHAIR", [path], how)
        self.objects_in = ObjectWords(_synonyms(Path(synonyms)))
        self.annotated: dict[int | str, set[str]] = defaultdict(set)
        for path in files:
            self._read(path)

    def _read(self, path: Path) -> None:
        content = read_json(path, dict, MAX_BYTES)
        with schema(path, "COCO's instances"):
            names = {category["id"]: category["name"] for category in content["categories"]}
            if unknown := [name for name in names.values() if name not in self.objects_in.object_of]:
                raise DataError(f"the synonyms have no word for the object {unknown[0]!r:.80} of {path}")
            objects = {id: self.objects_in.object_of[name] for id, name in names.items()}
            for annotation in content["annotations"]:
                self.annotated[check_id(annotation["image_id"])].add(objects[annotation["category_id"]])

    def __call__(
        self, records: Sequence[Record | Listing], captions: Mapping[int | str, str]
    ) -> Mapping[str, tuple[np.ndarray, np.ndarray | None]]:
        """See `coca_lit.evals.captions.Measure`; DataError if no image is annotated."""
        if not any(record.id in self.annotated for record in records):
            raise DataError("none of the images is annotated in COCO's instances: are the ids those of COCO?")
        named = [self.objects_in(captions[record.id]) for record in records]
        shown = [
            self.annotated.get(record.id, set()).union(*map(self.objects_in, record.captions)) for record in records
        ]
        return chair(named, shown)


def _synonyms(path: Path) -> list[list[str]]:
    try:
        with open_regular(path) as file:
            text = file.read(MAX_SYNONYMS + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    groups = [[word.strip() for word in line.split(",") if word.strip()] for line in text.splitlines()]
    if len(text) > MAX_SYNONYMS or not any(groups):
        raise DataError(f"{path} must hold a line for each object, its name and other words for it")
    return [group for group in groups if group]
