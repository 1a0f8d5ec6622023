"""The image encoder of CoCa: one of timm's, or a registered one, that gives patch or grid tokens."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, cast

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from coca_lit.errors import LEAST, check_number
from coca_lit.models import kernels
from coca_lit.models.convolutional import FrozenStages, as_tokens, frozen_stages, use_global_batch_norms
from coca_lit.models.inputs import Images, Input, InputKind, expect_batch, expect_pixels
from coca_lit.models.registry import IMAGE_ENCODERS, check_architecture

CLIP_NORMALISATION = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}


class Normalise(nn.Module):
    """uint8 pixels -> what the encoder was trained on, with its mean and deviation per channel; floats count as
    normalised already.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> (B, 3, H, W)"""
        expect_batch(images)
        if not is_raw(images):
            return images.to(self.mean.dtype)
        return (images.to(self.mean.dtype, memory_format=torch.contiguous_format) / 255 - self.mean) / self.std


def is_raw(pixels: Tensor) -> bool:
    """Whether pixels still have to be normalised; raises `TypeError` for integers other than uint8."""
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise TypeError(f"images must be torch.uint8, or normalised floats, got {pixels.dtype}")
    return pixels.dtype == torch.uint8


class ImageEncoder(nn.Module):
    """A timm model without its head: pixels -> tokens (B, S, width), S = H·W for the grid of a convolutional net.

    uint8 pixels are normalised here, on the device, with the mean and deviation that timm lists for the model.

    A registered encoder, see `register_image_encoder`, is a factory that takes `image_size` and the arguments and
    returns a module from normalised pixels (B, 3, H, W) to tokens (B, S, width) or a grid (B, width, H, W). The module
    has an integer `width`, and may have `mean` and `std`, three numbers each (default: CLIP's), `num_prefix_tokens`,
    `set_grad_checkpointing(on)`, and `set_input_size(img_size)` if its weights depend on the size. `BatchNorm2d`
    of PyTorch and timm are synchronised over ranks; subclasses, and batch norms of tokens, stay as they are.

    Args:
        name: of a timm model or a registered encoder.
        image_size: side of the square input in pixels.
        arguments: for timm or the factory.

    Attributes:
        input_kind: what a subclass takes in place of squares of pixels.
        token_kind: the class of what a subclass returns in place of a tensor.
    """

    input_kind: InputKind | None = None
    token_kind: ClassVar[type[Input] | None] = None

    def __init__(self, name: str, image_size: int, **arguments: Any) -> None:
        super().__init__()
        self._build = partial(_build_trunk, name, arguments)
        self.image_size = image_size
        trunk: Any = self._build(image_size)  # each family of timm has its own class
        self.trunk = trunk
        self.width: int = trunk.width if name in IMAGE_ENCODERS else trunk.head_hidden_size
        normalisation = getattr(trunk, "pretrained_cfg", CLIP_NORMALISATION)
        self.normalise = Normalise(*(getattr(trunk, key, normalisation[key]) for key in ("mean", "std")))

    @property
    def prefix_tokens(self) -> int:
        """How many tokens without a position, such as a class token, precede the grid."""
        return int(getattr(self.trunk, "num_prefix_tokens", 0))

    def init_parameters(self) -> None:
        """Copies the values of a second trunk, because every encoder family initialises itself when it is built."""
        self.trunk.load_state_dict(self._build(self.image_size).state_dict())

    def depths(self) -> dict[str, int]:
        """{parameter: layers from the top}: 1 in the last layer, one more in each before it. The layers are those that
        timm groups the parameters into: blocks of a transformer, residual blocks of a ResNet. Empty if timm does not
        know them.
        """
        if not hasattr(self.trunk, "group_matcher"):
            return {}
        groups = group_parameters(self.trunk, self.trunk.group_matcher(coarse=False))
        return {f"trunk.{name}": len(groups) - i for i, names in groups.items() for name in names}

    def set_image_size(self, image_size: int) -> None:
        """From now on the encoder takes images of this size. Position embeddings of a vision transformer are
        interpolated, by timm; convolutional nets have none.

        Raises:
            ValueError: the encoder depends on the size of its images in another way.
        """
        check_number("image_size", image_size, whole=True, at_least=LEAST["image_size"])
        if hasattr(self.trunk, "set_input_size"):
            self.trunk.set_input_size(img_size=(image_size, image_size))
        elif _shapes(self._build(image_size)) != _shapes(self.trunk):
            raise ValueError(
                f"the image encoder only takes images of {self.image_size} px, not {image_size}: it has no method"
                " set_input_size(img_size)"
            )
        self.image_size = image_size

    def set_grad_checkpointing(self, on: bool) -> None:
        if hasattr(self.trunk, "set_grad_checkpointing"):
            self.trunk.set_grad_checkpointing(on)
        elif on:
            raise ValueError("grad_checkpointing=blocks needs a method set_grad_checkpointing of the image encoder")

    def forward(self, images: Images) -> Images:
        """images (B, 3, H, W) -> tokens (B, S, width), or what an `Input` makes of them. An output of this method is
        returned as it is; an output of `frozen_part` passes the remaining stages.
        """
        if isinstance(images, Input):
            return images.encoded_by(self)
        expect_pixels(images)
        if images.ndim == 3 and images.is_floating_point():
            tokens = images.to(self.normalise.mean.dtype)
            return tokens if tokens.shape[2] == self.width else self._run_remaining(tokens)
        features = self.trunk(self.normalise(images))  # all of it: in some families the head holds the last norm
        return as_tokens(features, getattr(self.trunk, "output_fmt", "NCHW") == "NHWC")

    def frozen_part(self) -> nn.Module:
        """The part whose output for an image stays the same while the rest is trained: images (B, 3, H, W) -> tokens
        (B, S, C). It shares its parameters with the encoder, and is the encoder itself if that is frozen or trained as
        a whole.
        """
        frozen, _ = frozen_stages(self.trunk)
        return FrozenStages(self.normalise, frozen, self.width) if frozen else self

    def _run_remaining(self, tokens: Tensor) -> Tensor:
        """An output (B, S, C) of `frozen_part` -> tokens (B, S', width)."""
        frozen, remaining = frozen_stages(self.trunk)
        if not frozen:
            raise ValueError(f"images must have the shape (batch, 3, height, width), got {tuple(tokens.shape)}")
        side = math.isqrt(tokens.shape[1])
        grid = tokens.transpose(1, 2).unflatten(2, (side, side))  # (B, C, h, w)
        return as_tokens(nn.Sequential(*remaining)(grid))


def build_image_encoder(name: str, image_size: int, **arguments: Any) -> ImageEncoder:
    """The encoder of a timm model or of a registered name. What is registered makes a trunk, or is an `ImageEncoder`
    itself.
    """
    check_architecture(arguments)
    factory = IMAGE_ENCODERS.get(name)
    if isinstance(factory, type) and issubclass(factory, ImageEncoder):
        return cast(ImageEncoder, IMAGE_ENCODERS.build(name, {"image_size": image_size}, arguments))
    return ImageEncoder(name, image_size, **arguments)


def _build_trunk(name: str, arguments: dict[str, Any], image_size: int) -> nn.Module:
    if name in IMAGE_ENCODERS or not timm.is_model(name):
        trunk = IMAGE_ENCODERS.build(name, {"image_size": image_size}, arguments, timm.list_models())
        use_global_batch_norms(trunk)
        return trunk
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:  # transformers are built for one size, convolutions take any
        arguments = {"img_size": image_size, **arguments}
    if name.startswith("vit_") and "_clip_" in name:  # as in OpenCLIP, tokens go to the pooler without a final norm
        arguments = {"final_norm": False, **arguments}
    try:
        trunk = timm.create_model(name, num_classes=0, global_pool="", **arguments)
    except TypeError as error:
        raise ValueError(f"image_encoder_args: {error}") from error
    except AssertionError as error:  # of four families that have no tokens without their head
        raise TypeError(f"the image encoder {name} cannot be used: {error}") from error
    use_global_batch_norms(trunk)
    kernels.replace_timm_layers(trunk)
    return trunk


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}
