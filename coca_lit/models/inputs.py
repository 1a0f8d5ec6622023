"""What a model takes for an image: its pixels, or another kind of input.

How an image becomes the pixels that a model was trained on, `Preprocessing`, travels with the weights.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NotRequired, Self, TypedDict, cast, get_args

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from coca_lit.errors import DataError, check_choice
from coca_lit.models.config import Interpolation, ResizeMode


class Preprocessing(TypedDict):
    """The arguments of `coca_lit.data.transforms.build_transform`."""

    size: int
    interpolation: Interpolation
    resize_mode: ResizeMode
    input_kind: NotRequired["InputKind"]  # of an image encoder that takes no squares


def largest_shape(preprocessing: Preprocessing) -> tuple[int, int]:
    """Height and width of the largest image that a model takes."""
    if "input_kind" in preprocessing:
        return preprocessing["input_kind"].largest_shape
    return preprocessing["size"], preprocessing["size"]


def expect_pixels(images: Tensor) -> None:
    """Raises `TypeError` for a picture, or a list of them, in place of its pixels."""
    if not isinstance(images, Tensor):
        raise TypeError(
            f"images must be a tensor, got {type(images).__name__}: use"
            " coca_lit.build_transform(**model.preprocessing)(picture)[None]"
        )


def expect_batch(images: Tensor) -> None:
    """Raises `ValueError` for pixels of another shape than (B, 3, H, W)."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have the shape (batch, 3, height, width), got {tuple(images.shape)}")


def preprocessing(size: int, interpolation: Interpolation, resize_mode: ResizeMode) -> Preprocessing:
    """Raises `ValueError` for a name that does not exist."""
    check_choice("interpolation", interpolation, get_args(Interpolation))
    check_choice("resize_mode", resize_mode, get_args(ResizeMode))
    return {"size": size, "interpolation": interpolation, "resize_mode": resize_mode}


@dataclass(frozen=True, eq=False)
class Input:
    """A batch of images in another form than pixels (B, 3, H, W), or a single one, or what an image encoder makes of
    such a batch. A subclass is a kind of input: it says how images become a batch, and what models do with one.

    Attributes:
        rows: (B, …), of one image without B.
        poolers: of an encoder's output that is no tensor: names of the poolers that take it.
    """

    rows: Tensor
    poolers: ClassVar[Sequence[str]] = ()

    @classmethod
    def stack(cls, images: Sequence[Self]) -> Self:
        """A batch of single ones. In a data worker it lies in memory that the training process shares."""
        return cls(default_collate([image.rows for image in images]))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return replace(self, rows=self.rows.to(device, non_blocking=non_blocking))

    def detach(self) -> Self:
        return replace(self, rows=self.rows.detach())

    def pin_memory(self) -> Self:
        return replace(self, rows=self.rows.pin_memory())

    def __getitem__(self, index: int | slice | Sequence[int] | None) -> Self:
        """Some images of a batch, or one; with None a batch of one image."""
        return replace(self, rows=self.rows[index])

    def split(self, size: int) -> list[Self]:
        return [self[start : start + size] for start in range(0, len(self), size)]

    def mirrored(self) -> Self:
        """With left and right exchanged."""
        raise TypeError(f"{type(self).__name__} cannot be mirrored")

    def picture(self) -> Tensor:
        """Of a single one: its pixels (3, H, W), to look at."""
        raise TypeError(f"{type(self).__name__} is more than one picture")

    def token_grid(self) -> tuple[int, int]:
        """Of a single one: rows and columns of the tokens that the encoder makes of it."""
        raise TypeError(f"{type(self).__name__} is more than one picture")

    def encoded_by(self, encoder: Callable[[Tensor], Any]) -> Any:
        """What an image encoder for pixels (B, 3, H, W) makes of it: tokens (B, S, C), or another `Input`.

        Raises:
            TypeError: such an encoder cannot take it.
        """
        raise TypeError(f"this image encoder takes pixels (B, 3, H, W), got {type(self).__name__}")

    def pooled_by(self, pooling: Any, contrastive: bool, captioning: bool) -> tuple[Tensor | None, Tensor | None]:
        """Of an encoder's output: what a `Pooling` makes of it, as of `Pooling.pool`."""
        return pooling.pool(self, contrastive, captioning)

    def joined(self, pooling: Any = None) -> Tensor:
        """Of an encoder's output: all tokens of each image (B, S, C).

        Args:
            pooling: a `Pooling` in whose place something else sees these tokens.

        Raises:
            ConfigError: that pooling does not see them all at once.
        """
        return self.rows

    def class_tokens(self) -> Tensor:
        """Of an encoder's output: the token (B, C) that a CLIP takes for the whole image."""
        return self.rows[:, 0]


class InputKind(ABC):
    """What an image encoder takes in place of squares (3, S, S): how a picture becomes an `Input`. It holds plain
    values, as data workers get it, too.

    Attributes:
        what: it takes, for people.
    """

    what: ClassVar[str]

    @property
    @abstractmethod
    def largest_shape(self) -> tuple[int, int]:
        """Height and width in pixels of an image with as many tokens as any has."""

    @abstractmethod
    def transformed(self, picture: Image.Image, interpolation: Interpolation) -> Input:
        """What the encoder gets of a picture in RGB in an evaluation."""

    @abstractmethod
    def augmented(self, pixels: Tensor, rng: random.Random, budget: int | None = None, whole: bool = False) -> Input:
        """What it gets of pixels (3, H, W) uint8 in training.

        Args:
            budget: tokens of the image at most, where a schedule drew a number for the batch.
            whole: nothing is cropped.
        """


Images = Tensor | Input


def stack_images(images: Sequence[Images]) -> Images:
    """A batch of single images: pixels (B, 3, H, W) of one shape, or an `Input`.

    Raises:
        DataError: the images are of several kinds.
    """
    kind = type(images[0])
    if any(type(image) is not kind for image in images):
        raise DataError("images of several kinds are in one batch: take records of one kind")
    if issubclass(kind, Input):
        return kind.stack(cast(Sequence[Input], images))
    return torch.stack(cast(Sequence[Tensor], images))  # type: ignore[arg-type]


def joined(encoded: Images, pooling: Any = None) -> Tensor:
    """All tokens of each image (B, S, C) that an image encoder returned.

    Args:
        pooling: a `Pooling` in whose place something else sees these tokens.
    """
    return encoded.joined(pooling) if isinstance(encoded, Input) else encoded
