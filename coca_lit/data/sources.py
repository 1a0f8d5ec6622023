"""What the image of a record is read from. It may be any function that returns a picture; an `ImageSource` knows more:
how to read pixels without copies, or another kind of input than one picture.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coca_lit.data.pixels import decode_image, decode_pixels
from coca_lit.models.inputs import Images

BLANK = (32, 32)  # width and height in pixels of a picture without content

Transform = Callable[[Image.Image], Images]
"""For evaluation: any picture -> (3, size, size) uint8, or a single `Input`."""


class TrainTransform(Protocol):
    """For training: pixels (3, H, W) uint8 -> (3, size, size) uint8, or a single `Input`.

    Args:
        budget: the size of the image, in units of the transform, where the schedule draws one for each batch.
    """

    def __call__(self, pixels: Tensor, rng: random.Random, budget: int | None = None) -> Images: ...


class ImageSource(ABC):
    """An image of a record, or what stands in its place.

    Attributes:
        is_file: whether it is a file on disk, whose `state` tells its content apart.
    """

    is_file: ClassVar[bool] = False

    @abstractmethod
    def __call__(self) -> Image.Image:
        """A picture of it in RGB, to look at; raises `DataError` if it cannot be read."""

    def pixels(self) -> Tensor:
        """(3, H, W) uint8 of the picture."""
        return as_tensor(np.array(self()))

    def transformed(self, transform: Transform) -> Images:
        """What a model sees in an evaluation."""
        return transform(self())

    def augmented(self, transform: TrainTransform, rng: random.Random, budget: int | None = None) -> Images:
        """What a model sees in training."""
        return transform(self.pixels(), rng, budget)

    def blank(self, transform: Transform) -> Images:
        """As `transformed`, of the same form but without content."""
        return transform(Image.new("RGB", BLANK))

    def state(self) -> tuple[int, ...]:
        """See `coca_lit.files.state_of`; empty for what is no file."""
        return ()

    def why_not_cached(self, net: Any) -> str | None:
        """Why the output of the frozen stages of a network's image encoder cannot be stored in its place; None if it
        can.
        """
        return None

    def conditions(self, model: Any) -> dict[str, Any]:
        """What the scores of a model depend on besides the image itself, by name."""
        return {}


@dataclass(frozen=True)
class EncodedImage(ImageSource):
    """An image in memory, such as a member of a shard.

    Attributes:
        name: for errors.
    """

    content: bytes
    name: str

    def __call__(self) -> Image.Image:
        return decode_image(self.content, self.name)

    def pixels(self) -> Tensor:
        return as_tensor(decode_pixels(self.content, self.name))


def as_tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) -> (3, H, W), of the same memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)
