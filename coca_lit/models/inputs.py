"""What a model takes for an image: its pixels, the patches of one of any shape, or the frames of a clip.

How an image becomes the pixels that a model was trained on, `Preprocessing`, travels with the weights.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NotRequired, Self, TypedDict, cast, get_args

import torch
import torch.nn.functional as F
from timm.data.naflex_transforms import get_image_size_for_seq
from torch import Tensor
from torch.utils.data import default_collate

from coca_lit.errors import DataError, check_choice
from coca_lit.models.packing import to_device

Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "longest", "squash"]
FramePooling = Literal["tokens", "mean"]


class Preprocessing(TypedDict):
    """The arguments of `coca_lit.data.transforms.build_transform`."""

    size: int
    interpolation: Interpolation
    resize_mode: ResizeMode
    patch_size: NotRequired[int]  # of a model for images of any shape
    max_patches: NotRequired[int]


def largest_shape(preprocessing: Preprocessing) -> tuple[int, int]:
    """Height and width of the largest image that a model takes; of any shape, one as near to a square as the number of
    its patches allows.
    """
    if "max_patches" not in preprocessing:
        return preprocessing["size"], preprocessing["size"]
    most, side = preprocessing["max_patches"], preprocessing["patch_size"]
    rows = next(n for n in range(math.isqrt(most), 0, -1) if most % n == 0)
    return rows * side, most // rows * side


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
    """

    rows: Tensor

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


@dataclass(frozen=True, eq=False)
class Patches(Input):
    """An image of any shape, or with a dimension B in front of all tensors a batch of them, cut into square patches.

    Attributes:
        rows: (B, N, P·P·3) uint8, or normalised floats: the patches row by row, padded at the end. Within a patch the
            channel changes fastest, then x.
        grids: (B, 2), height and width in patches. On the host, as lengths of texts: positions and masks follow from
            them, and to read them from a GPU the host would wait for it.
    """

    grids: Tensor

    @classmethod
    def stack(cls, images: Sequence[Self]) -> Self:
        """Padded to the longest image."""
        longest = max(len(image) for image in images)
        rows = [F.pad(image.rows, (0, 0, 0, longest - len(image))) for image in images]
        return cls(torch.stack(rows), torch.stack([image.grids for image in images]))

    @classmethod
    def of(cls, pixels: Tensor, patch_size: int) -> Self:
        """pixels (…, 3, H, W), of an image or a batch, -> their patches.

        Raises:
            ValueError: a side is no multiple of the patch size.
        """
        height, width = pixels.shape[-2:]
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"images must have sides that are multiples of {patch_size} pixels, got {height} x {width}"
            )
        grid = (height // patch_size, width // patch_size)
        cells = pixels.unflatten(-2, (grid[0], patch_size)).unflatten(-1, (grid[1], patch_size))  # (…, 3, h, P, w, P)
        rows = cells.movedim(-5, -1).transpose(-4, -3).flatten(-5, -4).flatten(-3)
        return cls(rows, torch.tensor(grid).expand(*pixels.shape[:-3], 2))

    @property
    def counts(self) -> Tensor:
        """(B,), patches of each image."""
        return self.grids.prod(dim=-1)

    @property
    def valid(self) -> Tensor:
        """(B, N) on the host, False where there is padding."""
        return torch.arange(self.rows.shape[-2]) < self.counts[..., None]

    @property
    def coords(self) -> Tensor:
        """(B, N, 2) on the host, (y, x) of each patch, 0 where there is padding."""
        places, width = torch.arange(self.rows.shape[-2]), self.grids[..., 1, None]
        coords = torch.stack([places // width, places % width], dim=-1)
        return coords.masked_fill(~self.valid[..., None], 0)

    def key_mask(self, prefix: int = 0) -> Tensor | None:
        """(B, 1, 1, prefix + N) on the device, False where there is padding; None if there is none."""
        valid = self.valid
        if bool(valid.all()):
            return None
        mask = F.pad(valid, (prefix, 0), value=True)[:, None, None]
        return to_device(mask, self.rows.device)

    def picture(self) -> Tensor:
        """The opposite of `of`."""
        height, width = self.grids.tolist()
        side = round((self.rows.shape[-1] / 3) ** 0.5)
        cells = self.rows[: height * width].unflatten(-1, (side, side, 3)).unflatten(0, (height, width))
        return cells.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)

    def token_grid(self) -> tuple[int, int]:
        height, width = self.grids.tolist()
        return height, width

    def __getitem__(self, index: int | slice | Sequence[int] | None) -> Self:
        return replace(self, rows=self.rows[index], grids=self.grids[index])


class EncodedPatches(Patches):
    """The same after an image encoder: `rows` are tokens (B, N, width)."""


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


def patch_grid(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """The height and width in pixels, multiples of the patch size, to which OpenCLIP resizes an image directly: the
    largest of at most `max_patches` patches that has its aspect ratio, up to a patch; sides grow 100 times at most.
    """
    _, size = get_image_size_for_seq((height, width), patch_size, max_patches)
    return size


def joined(encoded: Images, pooling: Any = None) -> Tensor:
    """All tokens of each image (B, S, C) that an image encoder returned.

    Args:
        pooling: a `Pooling` in whose place something else sees these tokens.
    """
    return encoded.joined(pooling) if isinstance(encoded, Input) else encoded
