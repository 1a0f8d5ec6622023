"""Readers of annotation files: Karpathy's `dataset_*.json`, COCO captions (also nocaps) and COCO results."""

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coca_lit.data.records import Listing
from coca_lit.errors import DataError


def read_karpathy(path: Path, split: str) -> list[Listing]:
    """Images of one split of `{"images": [{filename, split, imgid, cocoid?, sentences: [{raw}]}]}`.

    "train" includes COCO's "restval", as is customary (82,783 + 30,504 images). Ids are `cocoid` where present, else
    `imgid`. Raises `DataError` for malformed files and unknown splits.
    """
    content = load_json(path)
    with schema(path, "Karpathy's"):
        images = content["images"]
        splits = sorted({image["split"] for image in images})
        wanted = {"train", "restval"} if split == "train" else {split}
        if not wanted.intersection(splits):
            raise DataError(f"{path} has no split {split!r}; it has {', '.join(splits)}")
        return [
            Listing(
                id=image.get("cocoid", image["imgid"]),
                filename=image["filename"],
                captions=tuple(sentence["raw"] for sentence in image["sentences"]),
            )
            for image in images
            if image["split"] in wanted
        ]


def read_coco(path: Path) -> list[Listing]:
    """All images of `{"images": [{id, file_name, domain?}], "annotations": [{image_id, caption}]}`.

    Raises `DataError` for malformed files, and for lists of images without captions, such as the test sets.
    """
    content = load_json(path)
    with schema(path, "the COCO captions"):
        captions: dict[int, list[str]] = defaultdict(list)
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        return [
            Listing(
                id=image["id"],
                filename=image["file_name"],
                captions=tuple(captions[image["id"]]),
                domain=image.get("domain"),
            )
            for image in content["images"]
        ]


def read_references(path: Path, split: str) -> list[Listing]:
    """Images of a file of either schema; `split` chooses among those of a Karpathy file.

    Raises `DataError`, also for an image that is listed twice.
    """
    content = load_json(path)
    coco = isinstance(content, dict) and "annotations" in content
    listings = read_coco(path) if coco else read_karpathy(path, split)
    if twice := [key for key, count in Counter(item.id for item in listings).items() if count > 1]:
        raise DataError(f"{path} lists image {twice[0]!r} twice")
    return listings


def read_results(path: Path) -> dict[int | str, str]:
    """Captions by image id of COCO results, `[{image_id, caption}]`. Raises `DataError`, also for a repeated id."""
    rows = load_json(path)
    captions: dict[int | str, str] = {}
    with schema(path, "the COCO results"):
        for row in rows:
            key, caption = row["image_id"], row["caption"]
            if key in captions:
                raise DataError(f"{path} holds more than one caption for image {key!r}")
            if not isinstance(caption, str):
                raise DataError(f"{path} holds {caption!r} as the caption of image {key!r}, expected a text")
            captions[key] = caption
    if not captions:
        raise DataError(f"{path} holds no captions")
    return captions


def load_json(path: Path) -> Any:
    """Parse a .json or .json.gz file; raises `DataError` naming the file when it is not JSON."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            return json.load(file)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} is not a readable JSON file: {error}") from error


def first_file(candidates: Sequence[Path]) -> Path | None:
    """The first of the paths that is a file."""
    return next((path for path in candidates if path.is_file()), None)


@contextmanager
def schema(path: Path, name: str) -> Iterator[None]:
    """Turns the error of a missing or mistyped field into a `DataError`."""
    try:
        yield
    except KeyError as error:
        raise DataError(f"{path} does not follow {name} schema: the field {error} is missing") from error
    except (TypeError, AttributeError) as error:
        wrong = "a list stands where an object belongs" if "list indices" in str(error) else error
        raise DataError(f"{path} does not follow {name} schema: {wrong}") from error
