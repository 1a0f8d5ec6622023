"""The image side of CoCa: a timm encoder, or a registered one, that gives patch or grid tokens, and the three ways of
pooling them for the two tasks.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal, cast, get_args

import timm
import torch
from timm.models import group_parameters
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import ResNet
from torch import Tensor, nn

from coca_lit.errors import check_number
from coca_lit.models import kernels
from coca_lit.models.init import init_normal, init_pooler, init_projection, init_query_pooler
from coca_lit.models.layers import AttentionalPooler, OpenClipNames, QueryPooler
from coca_lit.models.patches import EncodedPatches
from coca_lit.models.preprocessing import expect_batch, expect_pixels
from coca_lit.models.registry import IMAGE_ENCODERS
from coca_lit.models.sync_batch_norm import use_global_batch_norms

Pooler = Literal[
    "single",
    "parallel",
    "cascade",
    "openclip_parallel",
    "openclip_cascade",
    "masked_parallel",
    "masked_cascade",
    "mean",
    "mean_all",
]
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
        if not _is_raw(images):
            return images.to(self.mean.dtype)
        return (images.to(self.mean.dtype, memory_format=torch.contiguous_format) / 255 - self.mean) / self.std

    def patches(self, rows: Tensor) -> Tensor:
        """rows (B, N, P·P·3), the channel fastest, -> the same shape"""
        if not _is_raw(rows):
            return rows.to(self.mean.dtype)
        mean, std = self.mean.flatten(), self.std.flatten()
        return ((rows.unflatten(-1, (-1, 3)).to(mean.dtype) / 255 - mean) / std).flatten(-2)


def _is_raw(pixels: Tensor) -> bool:
    """Whether pixels still have to be normalised; raises `TypeError` for integers other than uint8."""
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise TypeError(f"images must be torch.uint8, or normalised floats, got {pixels.dtype}")
    return pixels.dtype == torch.uint8


_TRUNK_BLOCK = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


class ImageEncoder(nn.Module):
    """A timm model without its head: pixels -> tokens (B, S, width), S = H·W for the grid of a convolutional net.

    uint8 pixels are normalised here, on the device, with the mean and deviation that timm lists for the model.

    A registered encoder, see `register_image_encoder`, is a factory that takes `image_size` and the arguments and
    returns a module from normalised pixels (B, 3, H, W) to tokens (B, S, width) or a grid (B, width, H, W). The module
    has an integer `width`, and may have `mean` and `std`, three numbers each (default: CLIP's), `num_prefix_tokens`,
    `set_grad_checkpointing(on)`, and `set_input_size(img_size)` if its weights depend on the size. Its batch norms are
    synchronised over ranks, as timm's are.

    Args:
        name: of a timm model or a registered encoder.
        image_size: side of the square input in pixels.
        arguments: for timm or the factory.
    """

    open_clip_names: ClassVar[OpenClipNames] = (  # of CLIP's vision transformers
        ("trunk.blocks.", "visual.transformer.resblocks.", _TRUNK_BLOCK),
        ("trunk.patch_embed.proj.", "visual.conv1.", {}),
        ("trunk.norm_pre.", "visual.ln_pre.", {}),
        ("trunk.cls_token", "visual.class_embedding", {}),
        ("trunk.pos_embed", "visual.positional_embedding", {}),
        ("trunk.norm.", "visual.ln_post.", {}),  # of a CLIP
    )

    takes_patches = False  # rather than images of one shape
    open_clip_version = "3.3"

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
    def preprocessing(self) -> dict[str, int]:
        """What the image transform needs besides the size."""
        return {}

    @property
    def prefix_tokens(self) -> int:
        """How many tokens without a position, such as a class token, precede the grid."""
        return int(getattr(self.trunk, "num_prefix_tokens", 0))

    @property
    def open_clip_config(self) -> dict[str, Any]:
        """Its keys in OpenCLIP's `vision_cfg`, if it is one of CLIP's vision transformers."""
        trunk: Any = self.trunk
        width, heads = trunk.embed_dim, trunk.blocks[0].attn.num_heads
        return {
            "image_size": self.image_size,
            "layers": len(trunk.blocks),
            "width": width,
            "head_width": width // heads,
            "mlp_ratio": trunk.blocks[0].mlp.fc1.out_features / width,
            "patch_size": trunk.patch_embed.patch_size[0],
        }

    def init_parameters(self) -> None:
        """Copies the values of a second trunk, because every encoder family initialises itself when it is built."""
        self.trunk.load_state_dict(self._build(self.image_size).state_dict())

    def depths(self) -> dict[str, int]:
        """{parameter: layers from the top}: 1 in the last layer, one more in each before it. The layers are those that
        timm groups the parameters into: blocks of a transformer, stages of a ResNet. Empty if timm does not know them.
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
        check_number("image_size", image_size, whole=True, at_least=1)
        if hasattr(self.trunk, "set_input_size"):
            self.trunk.set_input_size(img_size=(image_size, image_size))
        elif _shapes(self._build(image_size)) != _shapes(self.trunk):
            raise ValueError(
                f"the weights of this image encoder only fit images of {self.image_size} px, not {image_size}: a "
                "registered encoder needs a method set_input_size(img_size) that changes them"
            )
        self.image_size = image_size

    def set_grad_checkpointing(self, on: bool) -> None:
        if hasattr(self.trunk, "set_grad_checkpointing"):
            self.trunk.set_grad_checkpointing(on)
        elif on:
            raise ValueError(
                "the image encoder has no method set_grad_checkpointing, so it cannot recompute activations"
            )

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> tokens (B, S, width). An output of this method is returned as it is; an output of
        `frozen_part` passes the remaining stages.
        """
        expect_pixels(images)
        if images.ndim == 3 and images.is_floating_point():
            tokens = images.to(self.normalise.mean.dtype)
            return tokens if tokens.shape[2] == self.width else self._run_remaining_stages(tokens)
        features = self.trunk(self.normalise(images))  # all of it: in some families the head holds the last norm
        return _tokens(features, getattr(self.trunk, "output_fmt", "NCHW") == "NHWC")

    def frozen_part(self) -> nn.Module:
        """The part whose output for an image stays the same while the rest is trained: images (B, 3, H, W) -> tokens
        (B, S, C).

        It shares its parameters with the encoder, and is the encoder itself if that is frozen or trained as a whole.
        """
        stages, count = _stages(self.trunk), self._frozen_stages()
        return FrozenStages(self.normalise, stages[:count]) if 0 < count < len(stages) else self

    def _run_remaining_stages(self, tokens: Tensor) -> Tensor:
        stages, side = _stages(self.trunk), math.isqrt(tokens.shape[1])
        count = self._frozen_stages()
        if not 0 < count < len(stages):
            raise ValueError(f"images must have the shape (batch, 3, height, width), got {tuple(tokens.shape)}")
        grid = tokens.transpose(1, 2).unflatten(2, (side, side))  # (B, C, h, w)
        return _tokens(nn.Sequential(*stages[count:])(grid))

    def _frozen_stages(self) -> int:
        """Number of stages before the first one that is trained."""
        trained = [any(p.requires_grad for p in stage.parameters()) for stage in _stages(self.trunk)]
        return [*trained, True].index(True)


class FrozenStages(nn.Module):
    """The first stages of an encoder: pixels (B, 3, H, W) -> the input of the next one, as tokens (B, H'·W', C)."""

    def __init__(self, normalise: Normalise, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.normalise = normalise
        self.stages = nn.Sequential(*stages)

    def forward(self, images: Tensor) -> Tensor:
        return _tokens(self.stages(self.normalise(images)))


def build_image_encoder(name: str, image_size: int, **arguments: Any) -> ImageEncoder:
    """The encoder of a timm model or of a registered name. What is registered makes a trunk, or is an `ImageEncoder`
    itself.
    """
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
    use_global_batch_norms(trunk)
    kernels.replace_timm_layers(trunk)
    return trunk


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _stages(trunk: nn.Module) -> list[nn.Module]:
    """The modules that pixels pass one after the other; the trunk alone if its family does more than that."""
    if isinstance(trunk, EfficientNet):
        return [trunk.conv_stem, trunk.bn1, *trunk.blocks, trunk.conv_head, trunk.bn2]
    if isinstance(trunk, ResNet):
        return [trunk.conv1, trunk.bn1, trunk.act1, trunk.maxpool, *(getattr(trunk, f"layer{i}") for i in range(1, 5))]
    return [trunk]


def _tokens(features: Tensor, channels_last: bool = False) -> Tensor:
    """Tokens (B, S, C) unchanged, grids (B, C, H, W) or (B, H, W, C) as tokens."""
    if features.ndim == 3:
        return features
    return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)


def build_pooling(
    variant: str, encoder: ImageEncoder, width: int, queries: int, heads: int, text_width: int
) -> "Pooling":
    """The pooling of a name, from tokens of the encoder to a vector, and tokens of `width` or the text's width."""
    context_width = encoder.width
    if variant in get_args(Pooler) and encoder.takes_patches != variant.startswith("masked_"):
        raise ValueError(
            "pooler=masked_parallel and masked_cascade belong to naflex, the other poolers to all other image encoders:"
            f" got pooler={variant} with a {type(encoder).__name__}"
        )
    if variant in ("mean", "mean_all"):
        return MeanPooling(context_width, text_width, encoder.prefix_tokens if variant == "mean" else 0)
    if variant in ("single", "parallel", "cascade"):
        return ImagePooling(variant, context_width, width, queries, heads)
    if variant in _OPEN_CLIP_POOLINGS:
        return _OPEN_CLIP_POOLINGS[variant](context_width, width, queries, heads)
    raise ValueError(f"pooler must be {' or '.join(map(repr, get_args(Pooler)))}, got '{variant}'")


class ImagePooling(nn.Module):
    """Image tokens -> one contrastive vector and the tokens that the decoder attends to.

    - single: one pooler; query 0 is the contrastive vector, the others are the decoder's tokens (OpenCLIP: 255 of 256).
    - parallel: two poolers side by side on the encoder's tokens (CoCa paper, section 3.2).
    - cascade: the contrastive pooler attends to the output of the generative one (same section).

    Every pooler ends in a norm, and the contrastive vector is projected (`CoCa.image_projection`).
    """

    projected = True
    open_clip_version = "3.3"  # the first that has the single pooler
    open_clip_names: ClassVar[OpenClipNames] = (  # of the single pooler
        ("generative.norm_out.", "visual.ln_post.", {}),
        ("generative.", "visual.attn_pool.", QueryPooler.open_clip_names),
    )

    def __init__(self, variant: str, context_width: int, width: int, queries: int, heads: int) -> None:
        super().__init__()
        self.vector_width = self.token_width = width
        self.variant = variant
        self.generative = AttentionalPooler(context_width, width, queries, heads)
        if variant != "single":
            self.contrastive = AttentionalPooler(context_width if variant == "parallel" else width, width, 1, heads)

    @property
    def open_clip_config(self) -> dict[str, Any] | None:
        """Its keys in OpenCLIP's `vision_cfg`, besides sizes; None if OpenCLIP has no such pooling."""
        return {"attentional_pool": True} if self.variant == "single" else None

    def parts_of_loss(self, loss: str) -> list[str]:
        """Children that only the "contrastive" or only the "caption" loss trains."""
        if loss == "contrastive":
            return ["contrastive"] if self.variant != "single" else []
        return ["generative"] if self.variant == "parallel" else []

    def init_parameters(self) -> None:
        init_pooler(self.generative)
        if self.variant != "single":
            init_pooler(self.contrastive)

    def forward(
        self, tokens: Tensor, contrastive: bool = True, captioning: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """tokens (B, S, C) -> contrastive vector (B, E) and decoder tokens (B, Q, E), None where switched off."""
        if self.variant == "single":
            queries = slice(0 if contrastive else 1, None if captioning else 1)
            pooled = self.generative(tokens, queries)
            first = 1 if contrastive else 0
            return (pooled[:, 0] if contrastive else None), (pooled[:, first:] if captioning else None)
        image_tokens = self.generative(tokens) if captioning or self.variant == "cascade" else None
        source = image_tokens if self.variant == "cascade" else tokens
        vector = self.contrastive(source)[:, 0] if contrastive else None
        return vector, (image_tokens if captioning else None)

    def attention(self, tokens: Tensor) -> Tensor:
        """Where each of the decoder's tokens looks among tokens (B, S, C): (B, Q, S), rows add up to 1."""
        return self.generative.weights(tokens, slice(1 if self.variant == "single" else 0, None))


class OpenClipCascade(nn.Module):
    """The two poolers of OpenCLIP 4: the image tokens are normed once, the contrastive pooler attends to what the
    generative one returns, and nothing follows either of them, neither norm nor projection.
    """

    projected = False
    open_clip_version = "4"
    open_clip_config: ClassVar[dict[str, Any]] = {"attentional_pool": "cascade"}
    open_clip_names: ClassVar[OpenClipNames] = (
        ("norm.", "visual.ln_post.", {}),
        ("generative.", "visual.attn_pool.", QueryPooler.open_clip_names),
        ("contrastive.", "visual.attn_pool_contrastive.", QueryPooler.open_clip_names),
    )

    def __init__(self, context_width: int, width: int, queries: int, heads: int) -> None:
        super().__init__()
        self.vector_width = self.token_width = width
        self.norm = nn.LayerNorm(context_width)
        self.generative = QueryPooler(context_width, width, queries, heads)
        self.contrastive = self._contrastive(context_width, width, heads)

    def _contrastive(self, context_width: int, width: int, heads: int) -> QueryPooler:
        return QueryPooler(width, width, 1, heads)

    def parts_of_loss(self, loss: str) -> list[str]:
        return ["contrastive"] if loss == "contrastive" else []

    def init_parameters(self) -> None:
        self.norm.reset_parameters()
        init_query_pooler(self.generative)
        init_query_pooler(self.contrastive)

    def forward(
        self, tokens: Tensor, contrastive: bool = True, captioning: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """tokens (B, S, C) -> contrastive vector (B, E) and decoder tokens (B, Q, E), None where switched off."""
        return self._pool(self.norm(tokens), None, contrastive, captioning)

    def _pool(
        self, normed: Tensor, mask: Tensor | None, contrastive: bool, captioning: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        image_tokens = self.generative(normed, mask=mask)
        vector = self.contrastive(image_tokens)[:, 0] if contrastive else None
        return vector, (image_tokens if captioning else None)

    def attention(self, tokens: Tensor) -> Tensor:
        """Where each of the decoder's tokens looks among tokens (B, S, C): (B, Q, S), rows add up to 1."""
        return self.generative.weights(self.norm(tokens))


class OpenClipParallel(OpenClipCascade):
    """As `OpenClipCascade`, but both poolers attend to the normed image tokens."""

    open_clip_config: ClassVar[dict[str, Any]] = {"attentional_pool": "parallel"}

    def _contrastive(self, context_width: int, width: int, heads: int) -> QueryPooler:
        return QueryPooler(context_width, width, 1, heads)

    def parts_of_loss(self, loss: str) -> list[str]:
        return ["contrastive"] if loss == "contrastive" else ["generative"]

    def _pool(
        self, normed: Tensor, mask: Tensor | None, contrastive: bool, captioning: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        vector = self.contrastive(normed, mask=mask)[:, 0] if contrastive else None
        return vector, (self.generative(normed, mask=mask) if captioning else None)


class MaskedCascade(OpenClipCascade):
    """As `OpenClipCascade`, for images of any shape: padding is never looked at. In OpenCLIP these poolers are
    siblings of timm's encoder, not parts of it, and their queries start smaller.
    """

    open_clip_names: ClassVar[OpenClipNames] = (
        ("norm.", "pool_norm.", {}),
        ("generative.", "attn_pool.", QueryPooler.open_clip_names),
        ("contrastive.", "attn_pool_contrastive.", QueryPooler.open_clip_names),
    )

    def init_parameters(self) -> None:
        super().init_parameters()
        for pooler in (self.generative, self.contrastive):
            init_normal(pooler.query, pooler.query.shape[1] ** -0.5)

    def forward(  # type: ignore[override]
        self, tokens: EncodedPatches, contrastive: bool = True, captioning: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        return self._pool(self.norm(tokens.rows), tokens.key_mask(), contrastive, captioning)

    def attention(self, tokens: EncodedPatches) -> Tensor:  # type: ignore[override]
        """Where each of the decoder's tokens looks among patches: (B, Q, N), rows add up to 1, padding has 0."""
        return self.generative.weights(self.norm(tokens.rows), mask=tokens.key_mask())


class MaskedParallel(MaskedCascade, OpenClipParallel):
    """As `MaskedCascade`, but both poolers attend to the normed image tokens."""


_OPEN_CLIP_POOLINGS = {
    "openclip_parallel": OpenClipParallel,
    "openclip_cascade": OpenClipCascade,
    "masked_parallel": MaskedParallel,
    "masked_cascade": MaskedCascade,
}


class MeanPooling(nn.Module):
    """MaMMUT's: the contrastive vector is the normed mean of the image tokens; the decoder attends to all of them,
    brought to its width.

    Args:
        left_out: leading tokens, such as a class token, that neither uses.
    """

    projected = True
    open_clip_version = "4"
    open_clip_names: ClassVar[OpenClipNames] = (
        ("norm.", "visual.ln_post.", {}),
        ("to_text.weight", "map_viz2txt_kv", {}),
    )

    def __init__(self, context_width: int, text_width: int, left_out: int) -> None:
        super().__init__()
        self.vector_width, self.token_width = context_width, text_width
        self.left_out = left_out
        self.norm = nn.LayerNorm(context_width)
        self.to_text = nn.Linear(context_width, text_width, bias=False)

    @property
    def open_clip_config(self) -> dict[str, Any]:
        return {"pool_type": "avg" if self.left_out else "avg_all", "final_ln_after_pool": True}

    def parts_of_loss(self, loss: str) -> list[str]:
        return ["norm"] if loss == "contrastive" else ["to_text"]

    def init_parameters(self) -> None:
        self.norm.reset_parameters()
        init_projection(self.to_text)

    def forward(
        self, tokens: Tensor, contrastive: bool = True, captioning: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """tokens (B, S, C) -> contrastive vector (B, C) and decoder tokens (B, Q, D), None where switched off."""
        tokens = tokens[:, self.left_out :]
        vector = self.norm(tokens.mean(dim=1)) if contrastive else None
        return vector, (self.to_text(tokens) if captioning else None)

    def attention(self, tokens: Tensor) -> Tensor:
        """Where each of the decoder's tokens looks among tokens (B, S, C): (B, Q, S), each at itself."""
        return torch.eye(tokens.shape[1], device=tokens.device)[self.left_out :].expand(len(tokens), -1, -1)


Pooling = ImagePooling | OpenClipCascade | MeanPooling
