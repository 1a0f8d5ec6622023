"""Tensors of OpenCLIP's files: of its captioners, to and from ours, and of its CLIP.

The tensors of a CoCa have the names of open_clip 2.11 to 3.3. Values differ in three ways: projections are stored
transposed there, the packed query/key/value projection of a cross-attention is two matrices here, and temperature and
bias of the contrastive logits are scalars there and vectors of one here. Without a decoder the counterpart of CoCa is
OpenCLIP's `CustomTextCLIP`. With timm's NaFlexVit, the encoder for images of any shape, the two poolers are siblings of
`visual`.

CLIP comes in two layouts: the text tower at the root (`CLIP`), or under `text.` (`CustomTextCLIP`). Both hold the same
tensors. Files with other towers are refused.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from coca_lit.models.clip import CLIP
from coca_lit.models.coca import CoCa
from coca_lit.models.image import ImageEncoder
from coca_lit.models.init import Uninitialised
from coca_lit.models.poolers import MaskedPooling, MeanPooling, OpenClipPooling, SinglePooling
from coca_lit.models.registry import of_guests
from coca_lit.models.text import ClassicDecoder, TextTower
from coca_lit.models.variants.mammut import TwoPassDecoder, TwoPassTower
from coca_lit.models.variants.modern import ModernDecoder, ModernTextTower
from coca_lit.models.variants.naflex import NaFlexEncoder
from coca_lit.weights.open_clip.config import clip_arguments, coca_arguments, obstacle_to_open_clip
from coca_lit.weights.open_clip.sizes import at_the_root, clip_sizes, coca_sizes, has_modern_towers

Model = TypeVar("Model", CoCa, CLIP)

_TRANSPOSED = {
    *("visual.proj", "text.text_projection", "text_decoder.text_projection"),
    *("map_viz2txt_kv", "text.lm_head", "text_projection"),
}
_CROSS_ATTENTION = re.compile(
    r"(decoder\.cross_blocks\.\d+|pooling\.(?:generative|contrastive))\.attention\.(q|kv)\.(weight|bias)"
)

# (beginning of names in a part, beginning of their names in OpenCLIP, {name inside: OpenCLIP's})
Names = tuple[tuple[str, str, dict[str, str]], ...]

_SELF_BLOCK = {
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "attention.qkv.": "attn.in_proj_",
    "attention.out": "attn.out_proj",
    "mlp.0": "mlp.c_fc",
    "mlp.2": "mlp.c_proj",
}
_CROSS_BLOCK = {**_SELF_BLOCK, "norm_context": "ln_1_kv"}
_QUERY_POOLER = {"norm_query": "ln_q", "norm_context": "ln_k", "attention.out": "attn.out_proj"}
_TRUNK_BLOCK = {
    "ls1": "ls_1",
    "ls2": "ls_2",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}

# A part takes the names of its class or of the nearest base class: a tower registered from outside takes its base's.
_NAMES: dict[type[nn.Module], Names] = {
    ImageEncoder: (  # CLIP's vision transformers
        ("trunk.blocks.", "visual.transformer.resblocks.", _TRUNK_BLOCK),
        ("trunk.patch_embed.proj.", "visual.conv1.", {}),
        ("trunk.norm_pre.", "visual.ln_pre.", {}),
        ("trunk.cls_token", "visual.class_embedding", {}),
        ("trunk.pos_embed", "visual.positional_embedding", {}),
        ("trunk.norm.", "visual.ln_post.", {}),  # of a CLIP
    ),
    NaFlexEncoder: (("trunk.", "visual.trunk.", {}),),
    SinglePooling: (
        ("generative.norm_out.", "visual.ln_post.", {}),
        ("generative.", "visual.attn_pool.", _QUERY_POOLER),
    ),
    OpenClipPooling: (
        ("norm.", "visual.ln_post.", {}),
        ("generative.", "visual.attn_pool.", _QUERY_POOLER),
        ("contrastive.", "visual.attn_pool_contrastive.", _QUERY_POOLER),
    ),
    MaskedPooling: (
        ("norm.", "pool_norm.", {}),
        ("generative.", "attn_pool.", _QUERY_POOLER),
        ("contrastive.", "attn_pool_contrastive.", _QUERY_POOLER),
    ),
    MeanPooling: (("norm.", "visual.ln_post.", {}), ("to_text.weight", "map_viz2txt_kv", {})),
    TextTower: (
        ("blocks.", "text.transformer.resblocks.", _SELF_BLOCK),
        ("position_embedding", "text.positional_embedding", {}),
        ("cls_embedding", "text.cls_emb", {}),
        ("norm.", "text.ln_final.", {}),
        ("projection.weight", "text.text_projection", {}),
        ("token_embedding.", "text.token_embedding.", {}),
    ),
    ModernTextTower: (
        ("norm.", "text.ln_final.", {}),
        ("projection.", "text.text_projection.", {}),
        ("", "text.", {}),
    ),
    TwoPassTower: (
        ("blocks.", "text.resblocks.", _SELF_BLOCK),
        ("position_embedding", "text.positional_embedding", {}),
        ("norm.", "text.ln_final.", {}),
        ("token_embedding.", "text.token_embedding.", {}),
    ),
    ClassicDecoder: (
        ("self_blocks.", "text_decoder.resblocks.", _SELF_BLOCK),
        ("cross_blocks.", "text_decoder.cross_attn.", _CROSS_BLOCK),
        ("norm.", "text_decoder.ln_final.", {}),
        ("vocabulary.weight", "text_decoder.text_projection", {}),
    ),
    ModernDecoder: (
        ("norm.", "text_decoder.ln_final.", {}),
        ("vocabulary.", "text_decoder.lm_head.", {}),
        ("", "text_decoder.", {}),
    ),
    TwoPassDecoder: (
        ("cross_blocks.", "text.cross_attn.", _CROSS_BLOCK),
        ("vocabulary.weight", "text.lm_head", {}),
    ),
}
_CLIP_NAMES: Names = (
    ("image_projection.weight", "visual.proj", {}),
    ("blocks.", "transformer.resblocks.", _SELF_BLOCK),
    ("position_embedding", "positional_embedding", {}),
    ("norm.", "ln_final.", {}),
    ("text_projection.weight", "text_projection", {}),
    ("token_embedding.", "token_embedding.", {}),
    ("logit_scale", "logit_scale", {}),
)


def to_open_clip(model: CoCa, version: str = "4") -> dict[str, Tensor]:
    """State dict that OpenCLIP's model of the same sizes loads strictly.

    Args:
        version: one of `VERSIONS`.

    Raises:
        ValueError: the model has parts that OpenCLIP's CoCa lacks.
    """
    if reason := obstacle_to_open_clip(model, version):
        raise ValueError(f"OpenCLIP cannot build this model: {reason}")
    state, names = model.state_dict(), _names(model)
    converted = {_rename(name, names): tensor for name, tensor in state.items() if not _CROSS_ATTENTION.fullmatch(name)}
    for ours in {match[1] for name in state if (match := _CROSS_ATTENTION.fullmatch(name))}:
        converted |= _join_cross_attention(state, ours, _rename(f"{ours}.", names))
    for name in converted.keys() & _TRANSPOSED:
        converted[name] = converted[name].T.contiguous()
    if "visual.class_embedding" in converted:
        converted["visual.class_embedding"] = converted["visual.class_embedding"].flatten()
    for name in ("visual.positional_embedding", "logit_scale", "logit_bias"):
        if name in converted:
            converted[name] = converted[name][0]
    if version == "mammut":
        converted["text.text_projection"] = converted.pop("text.lm_head")
    return converted


def from_open_clip(state: Mapping[str, Any], config: Mapping[str, Any] | None = None, **overrides: Any) -> CoCa:
    """Builds the CoCa that an OpenCLIP state dict, or a training checkpoint that holds one, belongs to, and loads it.

    Widths and depths are read from the tensors. Numbers of heads are not in them: they come from `config`, the content
    of the `open_clip_config.json` beside the weights, or follow OpenCLIP's rule of 64 per head (8 heads in the pooler);
    `overrides`, arguments of `CoCa`, take precedence. The CLS mask is that of the config. Without a config it is the
    legacy one that OpenCLIP 3 trains with, or with two poolers the correct one, as in OpenCLIP's coca2_ViT-B-32.

    Raises:
        ValueError: this is not an OpenCLIP CoCa, tensors are missing, left over or of the wrong shape, or `config` asks
            for something that CoCa lacks.
    """
    theirs = _plain_state(state)
    sizes = coca_sizes(theirs)
    if "map_viz2txt_kv" in theirs and "text.lm_head" not in theirs:  # names of the code that trained openMaMMUT
        theirs["text.lm_head"] = theirs.pop("text.text_projection")
    guests = bool(of_guests(overrides))
    model = _built(lambda: CoCa(**sizes | coca_arguments(config, sizes) | overrides), guests)
    _load(model, theirs, _names(model))
    return model


def clip_from_open_clip(state: Mapping[str, Any], config: Mapping[str, Any] | None = None, **overrides: Any) -> CLIP:
    """Builds the CLIP that an OpenCLIP state dict, or a training checkpoint that holds one, belongs to, and loads it.

    Sizes are read from the tensors, which become fp32 whatever they are stored in. The tensors show neither the numbers
    of heads nor the activation: they come from `config`, the content of the `open_clip_config.json` beside the weights,
    or default to the heads of OpenCLIP's model of that size, and GELU; `overrides`, arguments of `CLIP`, take
    precedence. With the wrong activation everything runs and all scores are slightly wrong.

    Raises:
        ValueError: an architecture that is not supported, or tensors are missing, left over or of the wrong shape.
    """
    theirs = _Tensors(at_the_root(_plain_state(state)))
    sizes = clip_sizes(theirs)
    model = _built(lambda: CLIP(**sizes | clip_arguments(config, sizes) | overrides))
    trunk = ((f"image_encoder.{a}", b, inside) for a, b, inside in _names_of(model.image_encoder))
    _load(model, theirs, (*trunk, *_CLIP_NAMES))
    return model


def _built(make: Callable[[], Model], guests: bool = False) -> Model:
    # A part from outside may derive what no file holds from its first values.
    with nullcontext() if guests else Uninitialised():
        return make()


def is_clip(state: Mapping[str, Any]) -> bool:
    """Whether a state dict, or a training checkpoint that holds one, is a CLIP's and not a CoCa's, with or without a
    decoder.
    """
    names = _plain_state(state)
    captioner = ("text_decoder.", "text.cls_emb", "map_viz2txt_kv")
    return (
        "logit_scale" in names
        and not has_modern_towers(names)
        and not any(name.startswith(captioner) for name in names)
    )


def _plain_state(state: Mapping[str, Any]) -> "_Tensors":
    """The tensors of a state dict or a training checkpoint, without the prefixes that wrappers add to their names."""
    state = state.get("state_dict", state)
    if not isinstance(state, Mapping):
        raise ValueError(f"the checkpoint's state_dict is a {type(state).__name__}, expected a dictionary of tensors")
    found = _Tensors({})
    for name, tensor in state.items():
        if isinstance(name, str) and isinstance(tensor, Tensor):
            name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
            if name not in ("text.attn_mask", "text_decoder.attn_mask"):  # constants that some versions stored
                found[name] = tensor
    return found


class _Tensors(dict[str, Tensor]):
    """Tensors by name, which know which of them were read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise ValueError(f"the checkpoint has no tensor '{name}'")
        self.read.add(name)
        return super().__getitem__(name)


def _load(model: CoCa | CLIP, theirs: Mapping[str, Tensor], names: Names) -> None:
    """Fills a model with all of the tensors; raises ValueError if some are missing, left over or of the wrong shape."""
    theirs, ours = _Tensors(theirs), {}
    for name, target in model.state_dict().items():
        if match := _CROSS_ATTENTION.fullmatch(name):
            there = _rename(f"{match[1]}.", names)
            tensor = _split_cross_attention(theirs, there, match[2], match[3])
        else:
            there = _rename(name, names)
            tensor = theirs[there].T if there in _TRANSPOSED else theirs[there]
        if [size for size in tensor.shape if size != 1] != [size for size in target.shape if size != 1]:
            shapes = f"{tuple(tensor.shape)} in the checkpoint, and '{name}' needs {tuple(target.shape)}"
            raise ValueError(f"'{there}' has the shape {shapes}")
        ours[name] = tensor.reshape(target.shape).to(target.dtype)
    if unread := sorted(theirs.keys() - theirs.read):
        kind = type(model).__name__
        raise ValueError(f"{len(unread)} tensors of the checkpoint have no place in {kind}, the first is '{unread[0]}'")
    model.load_state_dict(ours)


def _names_of(part: nn.Module | None) -> Names:
    """The names of the tensors of a part, ours and OpenCLIP's; none for a part that OpenCLIP lacks."""
    return next((_NAMES[kind] for kind in type(part).__mro__ if kind in _NAMES), ())


def _names(model: CoCa) -> Names:
    named = {part: _names_of(getattr(model, part)) for part in ("image_encoder", "pooling", "text", "decoder")}
    return (
        *((f"{part}.{ours}", theirs, inside) for part, names in named.items() for ours, theirs, inside in names),
        ("image_projection.weight", "visual.proj", {}),
        ("logit_scale", "logit_scale", {}),
        ("logit_bias", "logit_bias", {}),  # of a sigmoid loss only
    )


def _rename(ours: str, names: Names) -> str:
    """OpenCLIP's name of one of our tensors, by the first beginning that fits."""
    for our_prefix, their_prefix, inside in names:
        if ours.startswith(our_prefix):
            rest = ours.removeprefix(our_prefix)
            for a, b in inside.items():
                rest = rest.replace(a, b)
            return their_prefix + rest
    raise ValueError(f"'{ours}' has no counterpart in OpenCLIP")


def _split_cross_attention(theirs: Mapping[str, Tensor], module: str, part: str, kind: str) -> Tensor:
    """Weight or bias of the query or the key/value projection of their module, from one packed tensor or three."""
    prefix = f"{module}attn."
    # nn.MultiheadAttention keeps three if context and query widths differ.
    if kind == "weight" and f"{prefix}q_proj_weight" in theirs:
        parts = [theirs[f"{prefix}{p}_proj_weight"] for p in "qkv"]
    else:
        parts = list(theirs[f"{prefix}in_proj_{kind}"].chunk(3))
    return parts[0] if part == "q" else torch.cat(parts[1:])


def _join_cross_attention(state: Mapping[str, Tensor], module: str, their_module: str) -> dict[str, Tensor]:
    prefix = f"{their_module}attn."
    q, kv = (state[f"{module}.attention.{part}.weight"] for part in ("q", "kv"))
    biases = {f"{prefix}in_proj_bias": torch.cat([state[f"{module}.attention.{part}.bias"] for part in ("q", "kv")])}
    if q.shape[1] == kv.shape[1]:
        return {f"{prefix}in_proj_weight": torch.cat([q, kv]), **biases}
    k, v = kv.chunk(2)
    return {f"{prefix}q_proj_weight": q, f"{prefix}k_proj_weight": k, f"{prefix}v_proj_weight": v, **biases}
