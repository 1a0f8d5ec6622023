"""Reads the pages of a TIFF file as one picture."""

from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image, ImageSequence

from coca_lit.data.inputs import ImageReader
from coca_lit.data.sources import ImageSource
from coca_lit.errors import DataError


@dataclass(frozen=True)
class Burst(ImageSource):
    """The mean of the first pages of a file, or of its content."""

    path: Path
    pages: int
    content: bytes | None = None
    is_file: ClassVar[bool] = True

    def __call__(self) -> Image.Image:
        try:
            with Image.open(self.path if self.content is None else BytesIO(self.content)) as burst:
                pages = [
                    np.array(page.convert("RGB"), float) for page in islice(ImageSequence.Iterator(burst), self.pages)
                ]
        except OSError as error:
            raise DataError(f"{self.path} is not a readable burst: {error}") from error
        return Image.fromarray(np.mean(pages, axis=0).round().astype(np.uint8))

    def state(self) -> tuple[int, ...]:
        if self.content is not None:
            return ()
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns


class BurstReader(ImageReader):
    """Reads bursts.

    Args:
        pages: that are averaged.
    """

    kind = "burst"
    endings = (".tif",)
    suffixes = ("tif",)

    def __init__(self, pages: int) -> None:
        self.pages = pages

    def file(self, path: Path) -> ImageSource:
        return Burst(path, self.pages)

    def member(self, content: bytes, name: str) -> ImageSource:
        return Burst(Path(name), self.pages, content)
