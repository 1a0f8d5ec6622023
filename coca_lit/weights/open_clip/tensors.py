"""Tensors of OpenCLIP's files: of its captioners, to and from ours, and of its CLIP.

The tensors of a CoCa have the names of open_clip 2.11 to 3.3; each `Part` knows the names of its own tensors. Values
differ in three ways: projections are stored transposed there, the packed query/key/value projection of a
cross-attention is two matrices here, and temperature and bias of the contrastive logits are scalars there and vectors
of one here. Without a decoder the counterpart of CoCa is OpenCLIP's `CustomTextCLIP`.

CLIP comes in two layouts: the text tower at the root (`CLIP`), or under `text.` (`CustomTextCLIP`). Both hold the same
tensors. Files with other towers are refused.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from coca_lit.models.clip import CLIP
from coca_lit.models.coca import CoCa
from coca_lit.models.init import Uninitialised
from coca_lit.models.layers import CrossAttention
from coca_lit.models.registry import has_guests
from coca_lit.weights.open_clip import clip
from coca_lit.weights.open_clip.config import coca_arguments, described_parts
from coca_lit.weights.open_clip.parts import Part, Renaming, is_captioner, parts_in, parts_of

_NAMES = (  # of what belongs to no part
    Renaming("image_projection.weight", "visual.proj"),
    Renaming("logit_scale", "logit_scale"),
    Renaming("logit_bias", "logit_bias"),  # of a sigmoid loss only
)
_TRANSPOSED = ("visual.proj",)
_FLAT = ("logit_scale", "logit_bias")


def to_open_clip(model: CoCa, version: str = "4") -> dict[str, Tensor]:
    """State dict that OpenCLIP's model of the same sizes loads strictly.

    Args:
        version: as of `open_clip_config`.

    Raises:
        ValueError: the model has parts that OpenCLIP's CoCa lacks.
    """
    parts = described_parts(model, version)
    names = _names(parts)
    flat = {*_FLAT, *(name for part in parts for name in part.flat)}
    state = model.state_dict()
    packed = _packed(model)
    converted = {_rename(name, names): tensor for name, tensor in state.items() if name not in packed}
    for module in dict.fromkeys(module for module, _, _ in packed.values()):
        converted |= _join_cross_attention(state, module, names)
    for name in converted.keys() & _transposed(parts):
        converted[name] = converted[name].T.contiguous()
    for name in converted.keys() & flat:
        converted[name] = converted[name].squeeze()
    return parts[2].written(converted, version)


def from_open_clip(state: Mapping[str, Any], config: Mapping[str, Any] | None = None, **overrides: Any) -> CoCa:
    """Builds the CoCa that an OpenCLIP state dict, or a training checkpoint that holds one, belongs to, and loads it.

    Widths and depths are read from the tensors. Numbers of heads are not in them: they come from `config`, the content
    of the `open_clip_config.json` beside the weights, or follow OpenCLIP's rule of 64 per head (8 heads in the pooler);
    `overrides`, arguments of `CoCa`, take precedence. The CLS mask is that of the config. Without a config it is the
    legacy one that OpenCLIP 3 trains with, or with two poolers the correct one of OpenCLIP 4.

    Raises:
        ValueError: this is not an OpenCLIP CoCa, tensors are missing, left over or of the wrong shape, or `config` asks
            for something that CoCa lacks.
    """
    theirs = _plain_state(state)
    arguments = coca_arguments(theirs, config) | overrides
    text = parts_in(theirs).text
    if text is not None:
        theirs = _Tensors(text.read(theirs))
    # A part from outside may derive what no file holds from its first values.
    with nullcontext() if has_guests(overrides) else Uninitialised():
        model = CoCa(**arguments)
    parts = [part for part in parts_of(model) if part is not None]
    _load(model, theirs, _names(parts), _transposed(parts))
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
    theirs = _Tensors(clip.at_the_root(_plain_state(state)))
    sizes = clip.clip_sizes(theirs)
    with Uninitialised():
        model = CLIP(**sizes | clip.clip_arguments(config, sizes) | overrides)
    _load(model, theirs, clip.NAMES, clip.TRANSPOSED)
    return model


def is_clip(state: Mapping[str, Any]) -> bool:
    """Whether a state dict, or a training checkpoint that holds one, is a CLIP's and not a CoCa's, with or without a
    decoder.
    """
    names = _plain_state(state)
    return "logit_scale" in names and not is_captioner(names)


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


def _load(
    model: CoCa | CLIP, theirs: Mapping[str, Tensor], names: Sequence[Renaming], transposed: Collection[str]
) -> None:
    """Fills a model with all of the tensors; raises ValueError if some are missing, left over or of the wrong shape."""
    theirs = _Tensors(theirs)
    ours: dict[str, Tensor] = {}
    packed = _packed(model)
    for name, target in model.state_dict().items():
        if name in packed:
            module, part, kind = packed[name]
            there = _their_attention(module, names)
            tensor = _split_cross_attention(theirs, there, part, kind)
        else:
            there = _rename(name, names)
            tensor = theirs[there].T if there in transposed else theirs[there]
        if [size for size in tensor.shape if size != 1] != [size for size in target.shape if size != 1]:
            shapes = f"{tuple(tensor.shape)} in the checkpoint, and '{name}' needs {tuple(target.shape)}"
            raise ValueError(f"'{there}' has the shape {shapes}")
        ours[name] = tensor.reshape(target.shape).to(target.dtype)
    unread = sorted(theirs.keys() - theirs.read)
    if unread:
        kind = type(model).__name__
        raise ValueError(f"{len(unread)} tensors of the checkpoint have no place in {kind}, the first is '{unread[0]}'")
    model.load_state_dict(ours)


def _names(parts: Iterable[Part]) -> list[Renaming]:
    return [*(renaming for part in parts for renaming in part.names), *_NAMES]


def _transposed(parts: Iterable[Part]) -> set[str]:
    return {*_TRANSPOSED, *(name for part in parts for name in part.transposed)}


def _rename(ours: str, names: Sequence[Renaming]) -> str:
    """OpenCLIP's name of one of our tensors, by the first beginning that fits."""
    for renaming in names:
        if ours.startswith(renaming.ours):
            rest = ours.removeprefix(renaming.ours)
            for a, b in renaming.inside.items():
                rest = rest.replace(a, b)
            return renaming.theirs + rest
    raise ValueError(f"'{ours}' has no counterpart in OpenCLIP")


def _packed(model: nn.Module) -> dict[str, tuple[str, str, str]]:
    """The tensors that are packed into others in OpenCLIP, queries, keys and values of cross-attentions: our name ->
    name of the module, part of it, and weight or bias.
    """
    return {
        f"{module}.{part}.{kind}": (module, part, kind)
        for module, attention in model.named_modules()
        if isinstance(attention, CrossAttention)
        for part in ("q", "kv")
        for kind in ("weight", "bias")
    }


def _their_attention(module: str, names: Sequence[Renaming]) -> str:
    """The beginning of OpenCLIP's names of the tensors of such a module."""
    return f"{_rename(module.removesuffix('attention'), names)}attn."


def _split_cross_attention(theirs: Mapping[str, Tensor], prefix: str, part: str, kind: str) -> Tensor:
    """Weight or bias of the query or the key/value projection of their module, from one packed tensor or three."""
    # nn.MultiheadAttention keeps three if context and query widths differ.
    if kind == "weight" and f"{prefix}q_proj_weight" in theirs:
        parts = [theirs[f"{prefix}{p}_proj_weight"] for p in "qkv"]
    else:
        parts = list(theirs[f"{prefix}in_proj_{kind}"].chunk(3))
    return parts[0] if part == "q" else torch.cat(parts[1:])


def _join_cross_attention(state: Mapping[str, Tensor], module: str, names: Sequence[Renaming]) -> dict[str, Tensor]:
    prefix = _their_attention(module, names)
    q, kv = (state[f"{module}.{part}.weight"] for part in ("q", "kv"))
    biases = {f"{prefix}in_proj_bias": torch.cat([state[f"{module}.{part}.bias"] for part in ("q", "kv")])}
    if q.shape[1] == kv.shape[1]:
        return {f"{prefix}in_proj_weight": torch.cat([q, kv]), **biases}
    k, v = kv.chunk(2)
    return {f"{prefix}q_proj_weight": q, f"{prefix}k_proj_weight": k, f"{prefix}v_proj_weight": v, **biases}
