"""A `Record` is an image that can be loaded, with all its reference captions.

Every data set is a function that returns a list of records; the DataModules train on them, the evaluations score on
them. This module holds what these functions share: finding images and telling a user what is missing.
"""

import logging
import os
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from coca_lit.data.pixels import MAX_IMAGE, decode_pixels
from coca_lit.data.sources import ImageSource, as_tensor
from coca_lit.errors import DataError, DataNotFoundError
from coca_lit.files import state_of
from coca_lit.reading import open_regular, printable

T = TypeVar("T")
log = logging.getLogger(__name__)

MAX_MISSING = 0.01  # known copies lack a few files (Flickr8k lists one that never existed); more means a wrong folder
FEW_BAD = 2  # records that may be bad in any case


def most_bad(count: int) -> float:
    """How many of that many records may be bad: more mean a broken disk or a wrong folder."""
    return max(MAX_MISSING * count, FEW_BAD)


class _Record(NamedTuple):
    id: int | str
    image: Callable[[], Image.Image]
    captions: tuple[str, ...]
    domain: str | None
    question: str
    further: tuple[Callable[[], Image.Image], ...]


class Record(_Record):
    """One captioned image, or a text or question about one or several images.

    Args:
        id: unique within a split.
        image: a path, or a picklable function that returns an RGB image.
        captions: all references, or the only one; none for a test set without public answers.
        domain: by which scores are reported separately, such as nocaps' "near-domain", or the kind of a question.
        question: about the image, or a statement. The captions are then the answers, the most frequent first, or the
            label.
        further: images after the first one, such as the right one of two.
    """

    __slots__ = ()

    def __new__(
        cls,
        id: int | str,
        image: str | Path | Callable[[], Image.Image],
        captions: str | Iterable[str] = (),
        domain: str | None = None,
        question: str = "",
        further: Iterable[str | Path | Callable[[], Image.Image]] = (),
    ) -> "Record":
        image, *others = (ImageFile(Path(i)) if isinstance(i, str | Path) else i for i in (image, *further))
        captions = (captions,) if isinstance(captions, str) else tuple(captions)
        return super().__new__(cls, id, image, captions, domain, question, tuple(others))

    @property
    def images(self) -> tuple[Callable[[], Image.Image], ...]:
        return self.image, *self.further

    @property
    def image_key(self) -> Hashable:
        """Equal for records about one image: the function itself, or its identity if it has no hash."""
        try:
            hash(self.image)
        except TypeError:
            return id(self.image)
        return self.image


@dataclass(frozen=True)
class ImageFile(ImageSource):
    """An image on disk."""

    path: Path
    is_file: ClassVar[bool] = True

    def __call__(self) -> Image.Image:
        return Image.fromarray(self._decoded())

    def pixels(self) -> Tensor:
        return as_tensor(self._decoded())

    def state(self) -> tuple[int, ...]:
        return state_of(self.path)

    def _decoded(self) -> np.ndarray:
        """(H, W, 3) uint8; raises `DataError` if it cannot be read, and as `decode_pixels`."""
        try:
            with open_regular(self.path) as file:
                content = file.read(MAX_IMAGE + 1)  # a byte more than is decoded
        except OSError as error:
            raise DataError(f"{self.path} is not a readable image: {error}") from error
        return decode_pixels(content, self.path)


class Listing(NamedTuple):
    """An entry of an annotation file, whose images may or may not exist."""

    id: int | str
    filename: str
    captions: tuple[str, ...]  # as in the file
    domain: str | None = None
    question: str = ""
    further: tuple[str, ...] = ()  # files after the first one

    @property
    def files(self) -> tuple[str, ...]:
        return self.filename, *self.further

    def record(self, files: Mapping[str, Path]) -> Record:
        """Of an entry all of whose files exist, by their names."""
        images = [files[name] for name in self.files]
        return Record(self.id, images[0], map(str.strip, self.captions), self.domain, self.question, images[1:])


def not_found(what: str, where: Sequence[str | Path], how: str) -> DataNotFoundError:
    """The error for missing data: what is missing, where it was expected, how to get it. Which key names the place is
    known to the command, see `coca_lit.cli.assembly`.
    """
    places = ", ".join(str(place) for place in where)
    return DataNotFoundError(f"{what} not found (looked at {places}): {how}")


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
    files: dict[str, Path] = {}  # by one listing a folder: on a network disk far faster than one stat an image
    for folder in filter(Path.is_dir, reversed(folders)):
        files.update((entry.name, Path(entry.path)) for entry in os.scandir(folder) if entry.is_file())
    found = [item for item in listings if files.keys() >= {*item.files}]
    missing = [name for item in listings for name in item.files if name not in files]
    listed = sum(len(item.files) for item in listings)
    if not found or len(missing) > MAX_MISSING * listed:
        example = f", e.g. {printable(missing[0])}" if missing else ""
        where = [folder for folder in folders if folder.is_dir()] or folders[:1]
        raise not_found(f"{len(missing)} of {listed} images that {source} lists{example}", where, how)
    if missing:
        log.warning("skipped %d of %d images without a file, e.g. %s", len(missing), listed, printable(missing[0]))
    records = [item.record(files) for item in found if item.captions or item.question]  # a test set has no answers
    if len(records) < len(found):
        log.warning("skipped %d of %d images without a caption in %s", len(found) - len(records), len(found), source)
    if not records:
        raise DataError(f"{source} has no caption for any of its {len(found)} images")
    if len({record.id for record in records}) < len(records):
        raise DataError(f"{source} uses the same image id twice")
    return records


def drawn(values: Sequence[T], count: int) -> list[T]:
    """At most `count` of the values, drawn and in any order: every second image of a data set may be the same one."""
    return random.Random(0).sample(values, min(count, len(values)))


def trainable(records: Iterable[Record]) -> list[Record]:
    """The records without empty captions, and without those that then have none."""
    cleaned = (r if all(r.captions) else r._replace(captions=clean_captions(r.captions)) for r in records)
    return [record for record in cleaned if record.captions]


def clean_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """The captions stripped (COCO and nocaps have blanks and newlines around some), without empty ones."""
    return tuple(stripped for caption in captions if (stripped := caption.strip()))
