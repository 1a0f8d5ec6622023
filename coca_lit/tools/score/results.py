"""COCO results: files of captions by image id."""

from pathlib import Path

from coca_lit.data.datasets.annotations import MAX_BYTES, check_id, schema
from coca_lit.errors import DataError
from coca_lit.reading import read_json


def read_results(path: Path) -> dict[int | str, str]:
    """Captions by image id of COCO results, `[{image_id, caption}]`. Raises `DataError`, also for a repeated id."""
    rows = read_json(path, limit=MAX_BYTES)
    captions: dict[int | str, str] = {}
    with schema(path, "the COCO results"):
        for row in rows:
            key = check_id(row["image_id"])
            caption = row["caption"]
            if key in captions:
                raise DataError(f"{path} holds more than one caption for image {key!r}")
            if not isinstance(caption, str):
                raise DataError(f"{path} holds {caption!r} as the caption of image {key!r}, expected a text")
            captions[key] = caption
    if not captions:
        raise DataError(f"{path} holds no captions")
    return captions
