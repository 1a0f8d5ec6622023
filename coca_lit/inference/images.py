"""Finding a user's images and decoding them in batches, ahead of the model. What cannot be read is named, not fatal.

Images are turned upright as their EXIF data say, as any viewer shows them.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from coca_lit.data.records import decode_image, open_image
from coca_lit.data.transforms import build_transform
from coca_lit.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


class Source(NamedTuple):
    """An encoded image: a file, or a part of one."""

    name: str  # for people, and in results
    path: Path
    offset: int = 0
    size: int = -1  # bytes from `offset` on; -1 for all


class ImageBatch(NamedTuple):
    """The images of a list of sources, and which of them could not be read."""

    positions: list[int]  # in the list
    pixels: Tensor  # (B, 3, S, S) uint8, one for each position
    broken: dict[int, str]  # position -> why it cannot be read


def find_images(folder: Path) -> list[Path]:
    """The images in a folder and its subfolders, sorted by path; hidden files and folders are left out.

    Raises:
        DataError: there is no such folder.
    """
    return find_files(folder, SUFFIXES)


def find_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """As `find_images`, for files of any kind."""
    if not folder.is_dir():
        raise DataError(f"there is no folder '{folder}'")
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if name.lower().endswith(suffixes) and not name.startswith(".")]
    return sorted(found)


def open_upright(path: str | Path) -> Image.Image:
    """Decode the image file at `path` to RGB, turned as its EXIF data say; `DataError` if it cannot be read."""
    return ImageOps.exif_transpose(open_image(path))


def load_images(batches: Iterable[Sequence[Source]], image_size: int, num_workers: int = 0) -> Iterator[ImageBatch]:
    """Each batch of sources, in order, prepared as for evaluation.

    Args:
        batches: taken a few ahead of what is returned, in the calling process.
        num_workers: processes that decode ahead; 0 decodes when a batch is asked for.
    """
    yield from DataLoader(
        _Decoded(image_size),
        batch_sampler=batches,  # type: ignore[arg-type]  # a sampler of indices; the data set takes sources for them
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
    )


class _Decoded(Dataset[Tensor | str]):
    """source -> pixels (3, S, S), or the reason why there are none."""

    def __init__(self, image_size: int) -> None:
        self.transform = build_transform(size=image_size)

    def __getitem__(self, source: Source) -> Tensor | str:
        try:
            return self.transform(_decode(source))
        except DataError as error:
            return str(error)


def _decode(source: Source) -> Image.Image:
    if source.size < 0:
        return open_upright(source.path)
    try:
        with source.path.open("rb") as file:
            file.seek(source.offset)
            content = file.read(source.size)
    except OSError as error:
        raise DataError(f"{source.name} cannot be read: {error}") from error
    return ImageOps.exif_transpose(decode_image(BytesIO(content), source.name))


def _collate(items: list[Tensor | str]) -> ImageBatch:
    good = {i: item for i, item in enumerate(items) if isinstance(item, Tensor)}
    broken = {i: item for i, item in enumerate(items) if isinstance(item, str)}
    pixels = torch.stack([*good.values()]) if good else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    return ImageBatch([*good], pixels, broken)
