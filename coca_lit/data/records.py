"""A `Record` is an image that can be loaded plus all its reference captions.

Every data set reader returns a plain list of records; the DataModules train on them and the evaluations score on them.
This module holds what the readers share: opening images safely and telling a user what is missing.
"""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image, UnidentifiedImageError

from coca_lit.errors import DataError, DataNotFoundError

log = logging.getLogger(__name__)

MAX_PIXELS = 40_000_000  # a photo of a good camera; a 20 KB file can claim far more and fill the memory
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # plain pixels only: Pillow would run Ghostscript on an EPS named .jpg
MAX_RATIO = 100  # of the longer side to the shorter one: resizing the shorter one would blow up the other
MAX_MISSING = 0.01  # known copies lack single files (Flickr8k lists one that never existed); more means a wrong folder


class Record(NamedTuple):
    """One captioned image."""

    id: int | str  # unique within a split
    image: Callable[[], Image.Image]  # decodes to RGB when called; picklable
    captions: tuple[str, ...]  # all references
    domain: str | None = None  # nocaps: in-domain | near-domain | out-domain; of a question: the kind of its answer
    question: str = ""  # what is asked about the image; the captions are then the answers, the most frequent first


class Listing(NamedTuple):
    """What an annotation file says about one image, before anyone looked whether its file exists."""

    id: int | str
    filename: str
    captions: tuple[str, ...]  # as they stand in the file
    domain: str | None = None
    question: str = ""


class Pair(NamedTuple):
    """An image file and its captions, none where it lacks them: what is to be written as shards."""

    image: Path
    captions: tuple[str, ...]


def not_found(what: str, where: Sequence[str | Path], how: str) -> DataNotFoundError:
    """The error for missing data: what, where it was looked for, how to get it, and what runs without it."""
    places = ", ".join(str(place) for place in where)
    return DataNotFoundError(
        f"{what} not found (looked at {places}): {how}; "
        "to see the pipeline run without any data set: python train.py data=scenes"
    )


def decode_image(source: str | Path | IO[bytes], name: str | Path) -> Image.Image:
    """Decode to RGB; raises `DataError` naming `name` for anything but an image of `FORMATS` of sensible size."""
    try:
        with Image.open(source, formats=FORMATS) as image:
            check_shape(*image.size, name)  # from the header: nothing is decoded yet
            return image.convert("RGB")
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not a readable image: it is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise a zoo of types on broken bytes
        raise DataError(f"{name} is not a readable image: {error}") from error


def check_shape(width: int, height: int, name: str | Path) -> None:
    """Raises `DataError` for what would fill the memory when it is decoded or resized."""
    if width * height > MAX_PIXELS:
        raise DataError(f"{name} has {width} x {height} pixels, more than the {MAX_PIXELS:,} that are decoded")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise DataError(f"{name} has {width} x {height} pixels, no shape that a picture has")


def open_image(path: str | Path) -> Image.Image:
    """Decode the image file at `path` to RGB, see `decode_image`."""
    return decode_image(path, path)


@dataclass(frozen=True)
class ImageFile:
    """An image on disk, for a `Record`; called, it decodes as `open_image` does."""

    path: Path

    def __call__(self) -> Image.Image:
        return open_image(self.path)


def records_on_disk(listings: Iterable[Listing], folders: Sequence[Path], source: Path, how: str) -> list[Record]:
    """Records of the listed images whose files lie in `folders` (the first folder that has a name wins).

    Missing files are skipped with a warning up to `MAX_MISSING`; `source` (the annotation file) and `how` (to get the
    images) are for the error beyond that. Images without a caption are left out; an empty one stays, because it counts
    as a reference.
    """
    listings = list(listings)
    files = _files_in(folders)
    found = [(item, files[item.filename]) for item in listings if item.filename in files]
    missing = [item.filename for item in listings if item.filename not in files]
    if not found or len(missing) > MAX_MISSING * len(listings):
        example = f", e.g. {missing[0]}" if missing else ""
        where = [folder for folder in folders if folder.is_dir()] or folders[:1]
        raise not_found(f"{len(missing)} of {len(listings)} images that {source} lists{example}", where, how)
    if missing:
        log.warning("skipped %d of %d images without a file, e.g. %s", len(missing), len(listings), missing[0])
    records = [
        Record(item.id, ImageFile(path), tuple(map(str.strip, item.captions)), item.domain, item.question)
        for item, path in found
        if item.captions or item.question  # those of a test set have no public answers
    ]
    if len(records) < len(found):
        log.warning("skipped %d of %d images without a caption in %s", len(found) - len(records), len(found), source)
    if not records:
        raise DataError(f"{source} has no caption for any of its {len(found)} images")
    if len({record.id for record in records}) < len(records):
        raise DataError(f"{source} uses the same image id twice")
    return records


def trainable(records: Iterable[Record]) -> list[Record]:
    """The records with their empty captions dropped, and without those that have no other."""
    cleaned = (r if all(r.captions) else r._replace(captions=clean_captions(r.captions)) for r in records)
    return [record for record in cleaned if record.captions]


def clean_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """Captions without outer blanks and newlines (common in COCO and nocaps), empty ones dropped."""
    return tuple(stripped for caption in captions if (stripped := caption.strip()))


def _files_in(folders: Sequence[Path]) -> dict[str, Path]:
    """{file name: path}; one listing per folder is far quicker than one look per image on a network disk."""
    files: dict[str, Path] = {}
    for folder in reversed(folders):
        if folder.is_dir():
            files.update((entry.name, Path(entry.path)) for entry in os.scandir(folder) if entry.is_file())
    return files
