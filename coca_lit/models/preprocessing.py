"""How an image becomes the pixels that a model was trained on; it travels with the weights."""

from typing import Literal, NotRequired, TypedDict, get_args

from torch import Tensor

Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "longest", "squash"]


class Preprocessing(TypedDict):
    """The arguments of `coca_lit.data.transforms.build_transform`."""

    size: int
    interpolation: Interpolation
    resize_mode: ResizeMode
    patch_size: NotRequired[int]  # of a model for images of any shape
    max_patches: NotRequired[int]


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
    if interpolation not in get_args(Interpolation):
        raise ValueError(f"interpolation must be one of {', '.join(get_args(Interpolation))}, got {interpolation!r}")
    if resize_mode not in get_args(ResizeMode):
        raise ValueError(f"resize_mode must be one of {', '.join(get_args(ResizeMode))}, got {resize_mode!r}")
    return {"size": size, "interpolation": interpolation, "resize_mode": resize_mode}
