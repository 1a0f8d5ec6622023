"""The image side of CoCa: any timm encoder that gives patch or grid tokens, and the three ways of pooling them for
the two tasks.
"""

import difflib
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from coca_lit.models.kernels.timm_cpu import stages, use_faster_parts
from coca_lit.models.layers import AttentionalPooler
from coca_lit.models.sync_batch_norm import use_global_batch_norms

Pooler = Literal["single", "parallel", "cascade"]


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
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have the shape (batch, 3, height, width), got {tuple(images.shape)}")
        if images.dtype != torch.uint8:
            return images.to(self.mean.dtype)
        return (images.to(self.mean.dtype, memory_format=torch.contiguous_format) / 255 - self.mean) / self.std


class ImageEncoder(nn.Module):
    """A timm model without its head: pixels -> tokens (B, S, width), S = H·W for the grid of a convolutional net.

    uint8 pixels are normalised here, on the device, with the mean and deviation that timm lists for the model.
    """

    def __init__(self, name: str, image_size: int, **arguments: Any) -> None:
        super().__init__()
        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), n=5) or timm.list_models("vit_base*clip*")[:5]
            raise ValueError(f"timm has no model '{name}'; similar names: {', '.join(close)}")
        self._build = partial(_timm_trunk, name, image_size, arguments)
        self.image_size = image_size
        trunk: Any = self._build()  # each family of timm has its own class
        self.trunk = trunk
        self.width: int = trunk.head_hidden_size
        self.normalise = Normalise(trunk.pretrained_cfg["mean"], trunk.pretrained_cfg["std"])

    @property
    def prefix_tokens(self) -> int:
        """How many tokens that stand for no place, such as a class token, come before those of the grid."""
        return int(getattr(self.trunk, "num_prefix_tokens", 0))

    def init_parameters(self) -> None:
        """Every encoder family of timm has its own initialisation, applied when it is built: build one more and copy
        it.
        """
        self.trunk.load_state_dict(self._build().state_dict())

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> tokens (B, S, width). What came out of here before is taken as it is; what came out of
        `frozen_part` goes through the rest.
        """
        if images.ndim == 3 and images.is_floating_point():
            tokens = images.to(self.normalise.mean.dtype)
            return tokens if tokens.shape[2] == self.width else self._rest(tokens)
        features = self.trunk(self.normalise(images))  # all of it: in some families the head holds the last norm
        return _tokens(features, getattr(self.trunk, "output_fmt", "NCHW") == "NHWC")

    def frozen_part(self) -> nn.Module:
        """What need not be computed anew for an image while the rest is trained: images (B, 3, H, W) -> tokens
        (B, S, C). It shares its parameters with the encoder, and is the encoder itself if that is frozen or trained as
        a whole.
        """
        count = self._frozen_stages()
        return FrozenStages(self, count) if 0 < count < len(stages(self.trunk)) else self

    def _rest(self, tokens: Tensor) -> Tensor:
        """What `frozen_part` gave (B, S, C), through the stages after it."""
        rest, side = stages(self.trunk)[self._frozen_stages() :], math.isqrt(tokens.shape[1])
        if not 0 < len(rest) < len(stages(self.trunk)):
            raise ValueError(f"images must have the shape (batch, 3, height, width), got {tuple(tokens.shape)}")
        return _tokens(nn.Sequential(*rest)(tokens.transpose(1, 2).unflatten(2, (side, side))))  # (B, C, h, w) inside

    def _frozen_stages(self) -> int:
        """Number of stages before the first one that is trained."""
        trained = [any(p.requires_grad for p in stage.parameters()) for stage in stages(self.trunk)]
        return [*trained, True].index(True)


class FrozenStages(nn.Module):
    """The first stages of an encoder: pixels (B, 3, H, W) -> what the next one takes, as tokens (B, H'·W', C)."""

    def __init__(self, encoder: ImageEncoder, count: int) -> None:
        super().__init__()
        self.normalise = encoder.normalise
        self.stages = nn.Sequential(*stages(encoder.trunk)[:count])

    def forward(self, images: Tensor) -> Tensor:
        return _tokens(self.stages(self.normalise(images)))


def _tokens(features: Tensor, channels_last: bool = False) -> Tensor:
    """Tokens (B, S, C) as they are, grids (B, C, H, W) or (B, H, W, C) as tokens."""
    if features.ndim == 3:
        return features
    return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)


def _timm_trunk(name: str, image_size: int, arguments: dict[str, Any]) -> nn.Module:
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:  # transformers are built for one size, convolutions take any
        arguments = {"img_size": image_size, **arguments}
    if name.startswith("vit_") and "_clip_" in name:  # as in OpenCLIP, tokens go to the pooler without a final norm
        arguments = {"final_norm": False, **arguments}
    trunk = timm.create_model(name, num_classes=0, global_pool="", **arguments)
    use_global_batch_norms(trunk)
    use_faster_parts(trunk)
    return trunk


class ImagePooling(nn.Module):
    """Image tokens -> one contrastive vector and the tokens that the decoder attends to.

    - single: one pooler; query 0 is the contrastive vector, the others are the decoder's tokens (OpenCLIP: 255 of 256).
    - parallel: two poolers side by side on the encoder's tokens (CoCa paper, section 3.2).
    - cascade: the contrastive pooler attends to the output of the generative one (same section).
    """

    def __init__(self, variant: Pooler, context_width: int, width: int, queries: int, heads: int) -> None:
        super().__init__()
        if variant not in ("single", "parallel", "cascade"):
            raise ValueError(f"pooler must be 'single', 'parallel' or 'cascade', got '{variant}'")
        self.variant = variant
        self.generative = AttentionalPooler(context_width, width, queries, heads)
        if variant != "single":
            self.contrastive = AttentionalPooler(context_width if variant == "parallel" else width, width, 1, heads)

    def forward(
        self, tokens: Tensor, contrastive: bool = True, captioning: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """tokens (B, S, C) -> contrastive vector (B, E) and decoder tokens (B, Q, E), each None if it is not asked
        for.
        """
        if self.variant == "single":
            asked = slice(0 if contrastive else 1, None if captioning else 1)
            pooled = self.generative(tokens, asked)
            first = 1 if contrastive else 0
            return (pooled[:, 0] if contrastive else None), (pooled[:, first:] if captioning else None)
        image_tokens = self.generative(tokens) if captioning or self.variant == "cascade" else None
        source = image_tokens if self.variant == "cascade" else tokens
        vector = self.contrastive(source)[:, 0] if contrastive else None
        return vector, (image_tokens if captioning else None)

    def attention(self, tokens: Tensor) -> Tensor:
        """Where each of the decoder's tokens looks among tokens (B, S, C): (B, Q, S), rows add up to 1."""
        return self.generative.weights(tokens, slice(1 if self.variant == "single" else 0, None))
