"""A `Record` is an image that can be loaded, with all its reference captions.

Every data set is a function that returns a list of records; the DataModules train on them, the evaluations score on
them. This module holds what these functions share: opening images safely and telling a user what is missing.
"""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image, UnidentifiedImageError

from coca_lit.errors import DataError, DataNotFoundError
from coca_lit.reading import open_regular, printable

log = logging.getLogger(__name__)

MAX_IMAGE = 32 * 2**20  # bytes of an encoded image
MAX_PIXELS = 40_000_000  # a photo of a good camera; a file of 20 KB can claim far more and exhaust the memory
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # pixels only: Pillow would run Ghostscript on an EPS named .jpg
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")  # of files in these formats
MAX_RATIO = 100  # of the longer side to the shorter one: resizing the shorter one would enlarge the other beyond bounds
MAX_MISSING = 0.01  # known copies lack a few files (Flickr8k lists one that never existed); more means a wrong folder


class _Record(NamedTuple):
    id: int | str
    image: Callable[[], Image.Image]
    captions: tuple[str, ...]
    domain: str | None
    question: str


class Record(_Record):
    """One captioned image, or a question about one.

    Args:
        id: unique within a split.
        image: a path, or a picklable function that returns an RGB image.
        captions: all references, or the only one; none for a test set without public answers.
        domain: by which scores are reported separately, such as nocaps' "near-domain", or the kind of a question.
        question: about the image. The captions are then the answers, the most frequent first.
    """

    __slots__ = ()

    def __new__(
        cls,
        id: int | str,
        image: str | Path | Callable[[], Image.Image],
        captions: str | Iterable[str] = (),
        domain: str | None = None,
        question: str = "",
    ) -> "Record":
        image = ImageFile(Path(image)) if isinstance(image, str | Path) else image
        captions = (captions,) if isinstance(captions, str) else tuple(captions)
        return super().__new__(cls, id, image, captions, domain, question)


@dataclass(frozen=True)
class ImageFile:
    """An image on disk: called, it decodes the file as `open_image` does."""

    path: Path

    def __call__(self) -> Image.Image:
        return open_image(self.path)


class Listing(NamedTuple):
    """An entry of an annotation file, whose image may or may not exist."""

    id: int | str
    filename: str
    captions: tuple[str, ...]  # as in the file
    domain: str | None = None
    question: str = ""


def not_found(what: str, where: Sequence[str | Path], how: str) -> DataNotFoundError:
    """The error for missing data: what is missing, where it was expected, how to get it. Which key names the place is
    known to the command, see `coca_lit.cli.assembly`.
    """
    places = ", ".join(str(place) for place in where)
    return DataNotFoundError(f"{what} not found (looked at {places}): {how}")


def decode_image(source: str | Path | IO[bytes], name: str | Path) -> Image.Image:
    """Decode to RGB; raises `DataError` naming `name` for anything but an image of `FORMATS` of sensible size."""
    try:
        with open_regular(source) if isinstance(source, str | Path) else nullcontext(source) as file:
            check_bytes(file.seek(0, os.SEEK_END), name)
            file.seek(0)
            with Image.open(file, formats=FORMATS) as image:
                check_shape(*image.size, name)  # from the header: nothing is decoded yet
                return image.convert("RGB")
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not a readable image: it is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise many types on broken bytes
        raise DataError(f"{name} is not a readable image: {error}") from error


def check_bytes(size: int, name: str | Path) -> None:
    """Raises `DataError` for an encoded image of more than `MAX_IMAGE` bytes."""
    if size > MAX_IMAGE:
        raise DataError(f"{name} has {size:,} bytes, more than the {MAX_IMAGE:,} that are decoded")


def check_shape(width: int, height: int, name: str | Path) -> None:
    """Raises `DataError` for an image that would exhaust the memory when it is decoded or resized."""
    if width * height > MAX_PIXELS:
        raise DataError(f"{name} has {width} x {height} pixels, more than the {MAX_PIXELS:,} that are decoded")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise DataError(f"{name} has {width} x {height} pixels, an aspect ratio above {MAX_RATIO}")


def open_image(path: str | Path) -> Image.Image:
    """Decode the image file at `path` to RGB, see `decode_image`."""
    return decode_image(path, path)


def records_on_disk(listings: Iterable[Listing], folders: Sequence[Path], source: Path, how: str) -> list[Record]:
    """Records of the listed images whose files are in `folders`; the first folder with a file of that name wins.

    Images without a caption are left out; an empty caption stays, because it counts as a reference.

    Args:
        source: the annotation file, for errors.
        how: to get the images, for errors.

    Raises:
        DataError: more than `MAX_MISSING` of the files are missing (fewer are skipped with a warning), no image has a
            caption, or an id occurs twice.
    """
    listings = list(listings)
    files = _files_in(folders)
    found = [(item, files[item.filename]) for item in listings if item.filename in files]
    missing = [item.filename for item in listings if item.filename not in files]
    if not found or len(missing) > MAX_MISSING * len(listings):
        example = f", e.g. {printable(missing[0])}" if missing else ""
        where = [folder for folder in folders if folder.is_dir()] or folders[:1]
        raise not_found(f"{len(missing)} of {len(listings)} images that {source} lists{example}", where, how)
    if missing:
        log.warning("skipped %d of %d images without a file, e.g. %s", len(missing), len(listings), missing[0])
    records = [
        Record(item.id, ImageFile(path), tuple(map(str.strip, item.captions)), item.domain, item.question)
        for item, path in found
        if item.captions or item.question  # a test set has no public answers
    ]
    if len(records) < len(found):
        log.warning("skipped %d of %d images without a caption in %s", len(found) - len(records), len(found), source)
    if not records:
        raise DataError(f"{source} has no caption for any of its {len(found)} images")
    if len({record.id for record in records}) < len(records):
        raise DataError(f"{source} uses the same image id twice")
    return records


def trainable(records: Iterable[Record]) -> list[Record]:
    """The records without empty captions, and without those that then have none."""
    cleaned = (r if all(r.captions) else r._replace(captions=clean_captions(r.captions)) for r in records)
    return [record for record in cleaned if record.captions]


def clean_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """The captions stripped (COCO and nocaps have blanks and newlines around some), without empty ones."""
    return tuple(stripped for caption in captions if (stripped := caption.strip()))


def _files_in(folders: Sequence[Path]) -> dict[str, Path]:
    """{file name: path}; on a network disk one listing per folder is far faster than one stat per image."""
    files: dict[str, Path] = {}
    for folder in reversed(folders):
        if folder.is_dir():
            files.update((entry.name, Path(entry.path)) for entry in os.scandir(folder) if entry.is_file())
    return files
