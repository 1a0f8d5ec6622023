"""Finding a user's images and decoding them in batches, ahead of the model. What cannot be read is named, not fatal.

Images are turned upright as their EXIF data say, as any viewer shows them.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from coca_lit.data.records import DataError, open_image
from coca_lit.data.transforms import build_transform

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


class ImageBatch(NamedTuple):
    """Decoded images of a list, and what of it could not be read."""

    positions: list[int]  # in the list
    pixels: Tensor  # (B, 3, S, S) uint8, one for each position
    broken: dict[int, str]  # position -> why it cannot be read


def find_images(folder: Path) -> list[Path]:
    """The images in a folder and its subfolders, sorted by path; hidden files and folders are left out.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder '{folder}'")
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".") and is_image(name)]
    return sorted(found)


def is_image(name: str | Path) -> bool:
    """Whether a file is called like an image."""
    return str(name).lower().endswith(SUFFIXES)


def open_upright(path: str | Path) -> Image.Image:
    """Decode the image file at `path` to RGB, turned as its EXIF data say; `DataError` if it cannot be read."""
    return ImageOps.exif_transpose(open_image(path))


def load_images(
    paths: Sequence[Path], image_size: int, batch_size: int = 64, num_workers: int = 0
) -> Iterator[ImageBatch]:
    """Batches of the images at `paths`, in order, prepared as for evaluation; `num_workers` processes decode ahead."""
    loader = DataLoader(
        _Files(paths, image_size),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
    )
    yield from loader


class _Files(Dataset[tuple[int, Tensor | str]]):
    """(position, pixels (3, S, S) or the reason why there are none)."""

    def __init__(self, paths: Sequence[Path], image_size: int) -> None:
        self.paths = paths
        self.transform = build_transform(train=False, size=image_size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> tuple[int, Tensor | str]:
        try:
            return position, self.transform(open_upright(self.paths[position]))
        except DataError as error:
            return position, str(error)


def _collate(items: list[tuple[int, Tensor | str]]) -> ImageBatch:
    good = [(position, found) for position, found in items if isinstance(found, Tensor)]
    broken = {position: found for position, found in items if isinstance(found, str)}
    pixels = torch.stack([found for _, found in good]) if good else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    return ImageBatch([position for position, _ in good], pixels, broken)
