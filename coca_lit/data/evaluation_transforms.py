"""OpenCLIP's image preprocessing for evaluation, without the normalisation: uint8 out, the model normalises on the
device. It goes through Pillow, so that pixels, and with them scores, equal `open_clip.transform`'s to the last bit.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize
from torchvision.transforms.functional import pil_to_tensor, resize

from coca_lit.data.pixels import orientation_of, upright
from coca_lit.data.transforms import Transform, check_size
from coca_lit.models.patches import Patches, patch_grid
from coca_lit.models.preprocessing import Interpolation, ResizeMode, preprocessing


def build_transform(
    size: int = 224,
    interpolation: Interpolation = "bicubic",
    resize_mode: ResizeMode = "shortest",
    patch_size: int | None = None,
    max_patches: int | None = None,
) -> Transform:
    """For evaluation: photo -> (3, size, size), or `Patches`. `build_transform(**model.preprocessing)` is that of a
    model.

    Args:
        resize_mode: shortest: the shorter side becomes `size`, and the centre is kept. longest: the longer side becomes
            `size`, and the rest is black. squash: both sides become `size`.
        patch_size, max_patches: the whole photo in its own shape, in at most `max_patches` patches; `size` and
            `resize_mode` then have no effect.
    """
    check_size(size)
    preprocessing(size, interpolation, resize_mode)
    mode = InterpolationMode(interpolation)
    if patch_size is not None and max_patches is not None:
        return Compose([_to_rgb, ToPatches(patch_size, max_patches, mode)])
    if resize_mode == "longest":
        return Compose([_to_rgb, Letterbox(size, mode)])
    if resize_mode == "squash":
        return Compose([_to_rgb, Resize((size, size), interpolation=mode), PILToTensor()])
    return Compose([_to_rgb, Resize(size, interpolation=mode), CenterCrop(size), PILToTensor()])


class ToPatches:
    """The whole photo in its own shape, see `patch_grid`."""

    def __init__(self, patch_size: int, max_patches: int, interpolation: InterpolationMode) -> None:
        self.patch_size, self.max_patches, self.interpolation = patch_size, max_patches, interpolation

    def __repr__(self) -> str:
        return f"ToPatches({self.patch_size}, {self.max_patches}, {self.interpolation})"

    def __call__(self, image: Image.Image) -> Patches:
        height_width = patch_grid(image.height, image.width, self.patch_size, self.max_patches)
        return Patches.of(pil_to_tensor(resize(image, list(height_width), self.interpolation)), self.patch_size)


class Letterbox:
    """The whole photo in the middle of a black square."""

    def __init__(self, size: int, interpolation: InterpolationMode) -> None:
        self.size, self.interpolation = size, interpolation

    def __repr__(self) -> str:
        return f"Letterbox({self.size}, {self.interpolation})"

    def __call__(self, image: Image.Image) -> Tensor:
        ratio = max(image.size) / self.size
        height, width = (max(round(side / ratio), 1) for side in (image.height, image.width))
        part = pil_to_tensor(resize(image, [height, width], self.interpolation))
        pixels = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        top, left = (self.size - height) // 2, (self.size - width) // 2
        pixels[:, top : top + height, left : left + width] = part
        return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    """Upright as all images are, see `coca_lit.data.pixels`; one that was decoded there has no EXIF data."""
    rgb = image.convert("RGB")
    orientation = orientation_of(image.info.get("exif", b""))
    return rgb if orientation == 1 else Image.fromarray(upright(np.asarray(rgb), orientation))
