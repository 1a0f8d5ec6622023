"""Finds captioned images on a disk: tables, COCO and Flickr folders, and folders of image and text files."""

import csv
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from coca_lit.data.datasets.coco import mscoco_records
from coca_lit.data.datasets.flickr import FlickrName, flickr_records
from coca_lit.data.records import SUFFIXES, ImageFile, Record
from coca_lit.errors import DataError, DataNotFoundError
from coca_lit.reading import open_parquet

IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "filename", "file_name", "path", "file")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "description")


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
        pairs = [Pair(_path_of(record), record.captions) for record in records(split)]
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


def _path_of(record: Record) -> Path:
    assert isinstance(record.image, ImageFile)  # these data sets are on disk
    return record.image.path


def _read_folder(root: Path) -> Iterator[Pair]:
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix.lower() in SUFFIXES:
                text = path.with_suffix(".txt")
                yield Pair(path, _clean([text.read_text("utf-8-sig", "replace")] if text.is_file() else []))


def _read_table(path: Path, image_column: str | None, caption_column: str | None) -> list[Pair]:
    """Rows with the same image are one pair with several captions, as is a row with a list of them."""
    columns, rows = _open_table(path)
    image = _column(path, columns, "image_column", image_column, IMAGE_COLUMNS)
    caption = _column(path, columns, "caption_column", caption_column, CAPTION_COLUMNS)
    captions: dict[str, list[str]] = {}
    for row in rows:
        texts, name = row[caption], row[image]
        if not isinstance(name, str | None):  # such as the {bytes, path} of data sets on the Hub
            raise DataError(
                f"{path} holds no paths in its column {image!r}, but values of type {type(name).__name__}: "
                "save the images as files, and name a column of their paths with --image-column"
            )
        captions.setdefault(name or "", []).extend(texts if isinstance(texts, list) else [texts])
    return [Pair(path.parent / name, _clean(texts)) for name, texts in captions.items() if name.strip()]


def _open_table(path: Path) -> tuple[Sequence[str], Iterable[dict[str, Any]]]:
    if path.suffix in (".csv", ".tsv"):
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
                return reader.fieldnames or [], list(reader)
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path} is not a readable table: {error}; save it in UTF-8, with quotes closed") from error
    if path.suffix != ".parquet":
        raise DataError(f"{path} is not a .csv, .tsv or .parquet file")
    with open_parquet(path) as table:
        names = table.schema_arrow.names
    return names, _parquet_rows(path)


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    with open_parquet(path) as table:
        for batch in table.iter_batches():
            yield from batch.to_pylist()


def _column(path: Path, columns: Sequence[str], option: str, wanted: str | None, usual: Sequence[str]) -> str:
    known = [name for name in ([wanted] if wanted else usual) if name in columns]
    if not known:
        what = repr(wanted) if wanted else f"of the usual names ({', '.join(usual)})"
        flag = f"--{option.replace('_', '-')}"
        raise DataError(f"{path} has no column {what}, but {', '.join(columns) or 'none'}: name it with {flag}")
    return known[0]


def _clean(texts: Iterable[Any]) -> tuple[str, ...]:
    """One line each, empty ones dropped."""
    lines = (" ".join(text.split()) for text in texts if isinstance(text, str))
    return tuple(line for line in lines if line)
