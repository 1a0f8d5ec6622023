"""Images of any shape as a kind of input: how a picture becomes patches, and a batch of them.

An image is resized directly to the largest grid of patches within a budget that has its aspect ratio, as timm and
OpenCLIP do it.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.naflex_transforms import get_image_size_for_seq
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_to_tensor, resize

from coca_lit.data.transforms import Box, random_box, resized
from coca_lit.models.config import Interpolation
from coca_lit.models.inputs import Input, InputKind
from coca_lit.models.packing import to_device


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
        places = torch.arange(self.rows.shape[-2])
        width = self.grids[..., 1, None]
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

    poolers = ("masked_parallel", "masked_cascade")


@dataclass(frozen=True)
class AnyShape(InputKind):
    """Images in their own aspect ratio.

    Attributes:
        patch_size: side in pixels.
        max_patches: of an image, where no budget is drawn.
    """

    patch_size: int
    max_patches: int
    what: ClassVar[str] = "images of any shape"

    @property
    def largest_shape(self) -> tuple[int, int]:
        """As near to a square as the number of patches allows."""
        most = self.max_patches
        rows = next(n for n in range(math.isqrt(most), 0, -1) if most % n == 0)
        return rows * self.patch_size, most // rows * self.patch_size

    def transformed(self, picture: Image.Image, interpolation: Interpolation) -> Patches:
        """All of the picture."""
        size = patch_grid(picture.height, picture.width, self.patch_size, self.max_patches)
        pixels = pil_to_tensor(resize(picture, list(size), InterpolationMode(interpolation)))
        return Patches.of(pixels, self.patch_size)

    def augmented(self, pixels: Tensor, rng: random.Random, budget: int | None = None, whole: bool = False) -> Patches:
        """A random part of the image, about in the image's own shape, in at most `budget` patches."""
        height, width = pixels.shape[1:]
        box = Box(0, 0, height, width) if whole else random_box(height, width, rng, width / height)
        size = patch_grid(box.height, box.width, self.patch_size, budget or self.max_patches)
        return Patches.of(resized(pixels, box, size), self.patch_size)


def patch_grid(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """The height and width in pixels, multiples of the patch size, to which OpenCLIP resizes an image directly: the
    largest of at most `max_patches` patches that has its aspect ratio, up to a patch; sides grow 100 times at most.
    """
    _, size = get_image_size_for_seq((height, width), patch_size, max_patches)
    return size
