"""Finds captioned images on a disk: tables, COCO and Flickr folders, and folders of image and text files."""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, get_args

from coca_lit.data.datasets.captions import FlickrName, flickr_records, mscoco_records
from coca_lit.data.datasets.tables import CAPTION_COLUMNS, IMAGE_COLUMNS, clean, column, open_table
from coca_lit.data.pixels import SUFFIXES
from coca_lit.data.records import ImageFile, Record
from coca_lit.errors import DataError, DataNotFoundError


class Pair(NamedTuple):
    """An image file and its captions, of which there may be none: to be written as shards."""

    image: Path
    captions: tuple[str, ...]


def read_pairs(
    source: Path, image_column: str | None = None, caption_column: str | None = None, split: str = "train"
) -> list[Pair]:
    """All pairs of a source, in an order that depends on its content alone.

    Args:
        source: a .csv, .tsv or .parquet file with a column of paths (relative to the file) and one of captions; or a
            folder in the layout of COCO, Flickr8k or Flickr30k; or a folder, however deep, of NAME.jpg and NAME.txt.
        image_column, caption_column: of a table; by default the first of the usual names that it has.
        split: of COCO and Flickr.

    Raises:
        DataError: the source is none of these, or holds no pair.
    """
    if source.is_file():
        pairs = _read_table(source, image_column, caption_column)
    elif not source.is_dir():
        raise DataNotFoundError(f"there is no file or folder {source}")
    elif records := _known_records(source):
        found = [(record.image, record.captions) for record in records(split)]
        pairs = [Pair(image.path, captions) for image, captions in found if isinstance(image, ImageFile)]  # all are
    else:
        pairs = list(_read_folder(source))
    if not pairs:
        raise DataError(
            f"{source} holds no captioned images: expected a .csv, .tsv or .parquet file, a COCO or Flickr folder, a "
            "folder of NAME.jpg and NAME.txt, or one of img2dataset's .tar files"
        )
    return pairs


def _known_records(root: Path) -> Callable[[str], list[Record]] | None:
    for name in get_args(FlickrName):
        if (root / f"dataset_{name}.json").is_file():
            return functools.partial(flickr_records, root, name=name)
    coco = (root / "dataset_coco.json", root / "annotations" / "dataset_coco.json")
    if any(path.is_file() for path in coco) or [*root.glob("annotations/captions_*.json")]:
        return functools.partial(mscoco_records, root)
    return None


def _read_folder(root: Path) -> Iterator[Pair]:
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix.lower() in SUFFIXES:
                text = path.with_suffix(".txt")
                yield Pair(path, clean([text.read_text("utf-8-sig", "replace")] if text.is_file() else []))


def _read_table(path: Path, image_column: str | None, caption_column: str | None) -> list[Pair]:
    """Rows with the same image are one pair with several captions, as is a row with a list of them."""
    columns, rows = open_table(path)
    image = column(path, columns, IMAGE_COLUMNS, "name it with --image-column", image_column)
    caption = column(path, columns, CAPTION_COLUMNS, "name it with --caption-column", caption_column)
    captions: dict[str, list[str]] = {}
    for row in rows:
        texts, name = row[caption], row[image]
        if not isinstance(name, str | None):  # such as the {bytes, path} of data sets on the Hub
            raise DataError(
                f"{path} holds no paths in its column {image!r}, but values of type {type(name).__name__}: "
                "save the images as files, and name a column of their paths with --image-column"
            )
        captions.setdefault(name or "", []).extend(texts if isinstance(texts, list) else [texts])
    return [Pair(path.parent / name, clean(texts)) for name, texts in captions.items() if name.strip()]
