"""Weights from and to OpenCLIP's CoCa, tensor for tensor (key names of open_clip 2.11 to 3.3).

Names differ by the table below. Values differ in three ways: projections are stored transposed there, the packed
query/key/value projection of a cross-attention is two matrices here, and temperature and bias of the contrastive
logits are scalars there and vectors of one here. Without a decoder the counterpart is OpenCLIP's `CustomTextCLIP`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from coca_lit.models.coca import CoCa
from coca_lit.weights.open_clip_config import arguments_of

BLOCK = [
    ("norm_1", "ln_1"),
    ("norm_2", "ln_2"),
    ("norm_context", "ln_1_kv"),
    ("attention.qkv.", "attn.in_proj_"),
    ("attention.out", "attn.out_proj"),
    ("mlp.0", "mlp.c_fc"),
    ("mlp.2", "mlp.c_proj"),
]
_TRUNK_BLOCK = [
    ("norm1", "ln_1"),
    ("norm2", "ln_2"),
    ("attn.qkv.", "attn.in_proj_"),
    ("attn.proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
]
# (prefix here, prefix there, names inside); the first prefix that fits is taken.
Parts = list[tuple[str, str, list[tuple[str, str]]]]
TRUNK: Parts = [
    ("image_encoder.trunk.blocks.", "visual.transformer.resblocks.", _TRUNK_BLOCK),
    ("image_encoder.trunk.patch_embed.proj.", "visual.conv1.", []),
    ("image_encoder.trunk.norm_pre.", "visual.ln_pre.", []),
    ("image_encoder.trunk.cls_token", "visual.class_embedding", []),
    ("image_encoder.trunk.pos_embed", "visual.positional_embedding", []),
]
_PARTS: Parts = [
    *TRUNK,
    ("pooling.generative.norm_out.", "visual.ln_post.", []),
    ("pooling.generative.norm_query.", "visual.attn_pool.ln_q.", []),
    ("pooling.generative.norm_context.", "visual.attn_pool.ln_k.", []),
    ("pooling.generative.", "visual.attn_pool.", [("attention.out", "attn.out_proj")]),
    ("image_projection.weight", "visual.proj", []),
    ("text.blocks.", "text.transformer.resblocks.", BLOCK),
    ("text.position_embedding", "text.positional_embedding", []),
    ("text.cls_embedding", "text.cls_emb", []),
    ("text.norm.", "text.ln_final.", []),
    ("text.projection.weight", "text.text_projection", []),
    ("text.token_embedding.", "text.token_embedding.", []),
    ("decoder.self_blocks.", "text_decoder.resblocks.", BLOCK),
    ("decoder.cross_blocks.", "text_decoder.cross_attn.", BLOCK),
    ("decoder.norm.", "text_decoder.ln_final.", []),
    ("decoder.vocabulary.weight", "text_decoder.text_projection", []),
    ("logit_scale", "logit_scale", []),
    ("logit_bias", "logit_bias", []),  # of a sigmoid loss only
]
_TRANSPOSED = {"visual.proj", "text.text_projection", "text_decoder.text_projection"}
_CROSS_ATTENTION = re.compile(r"(decoder\.cross_blocks\.\d+|pooling\.generative)\.attention\.(q|kv)\.(weight|bias)")


def to_open_clip(model: CoCa) -> dict[str, Tensor]:
    """State dict that OpenCLIP's model of the same sizes takes strictly.

    Raises:
        ValueError: the model has parts that OpenCLIP's CoCa has not.
    """
    config = model.config
    if config["pooler"] != "single" or not hasattr(model.image_encoder.trunk, "norm_pre"):
        raise ValueError("only a CoCa with a CLIP vision transformer and the single pooler has an OpenCLIP counterpart")
    state = model.state_dict()
    converted = {_their_name(name): tensor for name, tensor in state.items() if not _CROSS_ATTENTION.fullmatch(name)}
    for ours in {match[1] for name in state if (match := _CROSS_ATTENTION.fullmatch(name))}:
        converted |= _join_cross_attention(state, ours)
    for name in converted.keys() & _TRANSPOSED:
        converted[name] = converted[name].T.contiguous()
    converted["visual.class_embedding"] = converted["visual.class_embedding"].flatten()
    converted["visual.positional_embedding"] = converted["visual.positional_embedding"][0]
    for name in ("logit_scale", "logit_bias"):
        if name in converted:
            converted[name] = converted[name][0]
    return converted


def from_open_clip(state: Mapping[str, Any], config: Mapping[str, Any] | None = None, **overrides: Any) -> CoCa:
    """Builds the CoCa that an OpenCLIP state dict, or a training checkpoint that holds one, belongs to, and loads it.

    Widths and depths are read from the tensors. Numbers of heads are not in them: they come from `config`, the content
    of the `open_clip_config.json` beside the weights, or follow OpenCLIP's rule of 64 per head (8 heads in the pooler);
    `overrides`, arguments of `CoCa`, have the last word. The CLS mask is the legacy one that OpenCLIP trains with.

    Raises:
        ValueError: this is not an OpenCLIP CoCa, tensors are missing, left over or of the wrong shape, or `config` asks
        for what CoCa has not.
    """
    theirs = plain_state(state)
    if missing := [key for key in ("visual.attn_pool.query", "text.cls_emb") if key not in theirs]:
        raise ValueError(f"this is not an OpenCLIP CoCa checkpoint: it has no tensor '{missing[0]}'")
    sizes = _sizes_of(theirs)
    model = CoCa(**sizes | arguments_of(config, sizes) | overrides)
    ours: dict[str, Tensor] = {}
    for name, target in model.state_dict().items():
        ours[name] = _their_tensor(theirs, name).reshape(target.shape).to(target.dtype)
    used = to_open_clip(model).keys()
    if unused := sorted(theirs.keys() - used):
        raise ValueError(f"{len(unused)} tensors of the checkpoint have no place in CoCa, the first is '{unused[0]}'")
    model.load_state_dict(ours)
    return model


def plain_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict or a training checkpoint, without what wrappers put before their names."""
    state = state.get("state_dict", state)
    names = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in state.items()}
    masks = ("text.attn_mask", "text_decoder.attn_mask")  # constants that some versions stored
    return {name: tensor for name, tensor in names.items() if name not in masks}


def _sizes_of(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    image_width, _, patch, _ = theirs["visual.conv1.weight"].shape
    grid = math.isqrt(len(theirs["visual.positional_embedding"]) - 1)
    vocab_size, text_width = theirs["text.token_embedding.weight"].shape
    check_vocabulary(vocab_size)
    mlp_width = len(theirs["visual.transformer.resblocks.0.mlp.c_fc.weight"])
    return {
        "image_encoder": "vit_base_patch32_clip_224",
        "image_encoder_args": {
            "patch_size": patch,
            "embed_dim": image_width,
            "depth": depth(theirs, "visual.transformer.resblocks"),
            "num_heads": max(image_width // 64, 1),
            **({"mlp_ratio": mlp_width / image_width} if mlp_width != 4 * image_width else {}),
        },
        "image_size": grid * patch,
        "embed_dim": theirs["visual.proj"].shape[1],
        "pooler_queries": len(theirs["visual.attn_pool.query"]),
        "context_length": len(theirs["text.positional_embedding"]) - 1,
        "cls_mask": "legacy",
        "text_width": text_width,
        "text_layers": depth(theirs, "text.transformer.resblocks"),
        "text_heads": max(text_width // 64, 1),
        "decoder_layers": depth(theirs, "text_decoder.resblocks"),
        "contrastive": "siglip" if "logit_bias" in theirs else "softmax",
    }


def check_vocabulary(size: int) -> None:
    if size != 49408:
        raise ValueError(f"the checkpoint has a vocabulary of {size} tokens; only CLIP's 49408 can be read")


def depth(theirs: Mapping[str, Tensor], prefix: str) -> int:
    """Number of blocks whose names start with `prefix`."""
    return len({name.removeprefix(f"{prefix}.").split(".")[0] for name in theirs if name.startswith(f"{prefix}.")})


def _their_name(ours: str) -> str:
    return rename(ours, _PARTS)


def rename(ours: str, parts: Parts) -> str:
    """OpenCLIP's name of a tensor."""
    for here, there, inside in parts:
        if ours.startswith(here):
            rest = ours.removeprefix(here)
            for a, b in inside:
                rest = rest.replace(a, b)
            return there + rest
    raise ValueError(f"'{ours}' has no counterpart in OpenCLIP")


def _their_tensor(theirs: Mapping[str, Tensor], ours: str) -> Tensor:
    if match := _CROSS_ATTENTION.fullmatch(ours):
        return _split_cross_attention(theirs, *match.groups())
    name = _their_name(ours)
    if name not in theirs:
        raise ValueError(f"the checkpoint has no tensor '{name}'")
    return theirs[name].T if name in _TRANSPOSED else theirs[name]


def _split_cross_attention(theirs: Mapping[str, Tensor], module: str, part: str, kind: str) -> Tensor:
    """Weight or bias of the query or the key/value projection, from one packed tensor or three."""
    prefix = f"{_their_name(module + '.')}attn."
    if (
        kind == "weight" and f"{prefix}q_proj_weight" in theirs
    ):  # nn.MultiheadAttention keeps three if context and query widths differ
        parts = [theirs[f"{prefix}{p}_proj_weight"] for p in "qkv"]
    else:
        parts = list(theirs[f"{prefix}in_proj_{kind}"].chunk(3))
    return parts[0] if part == "q" else torch.cat(parts[1:])


def _join_cross_attention(state: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    prefix = f"{_their_name(module + '.')}attn."
    q, kv = (state[f"{module}.attention.{part}.weight"] for part in ("q", "kv"))
    biases = {f"{prefix}in_proj_bias": torch.cat([state[f"{module}.attention.{part}.bias"] for part in ("q", "kv")])}
    if q.shape[1] == kv.shape[1]:
        return {f"{prefix}in_proj_weight": torch.cat([q, kv]), **biases}
    k, v = kv.chunk(2)
    return {f"{prefix}q_proj_weight": q, f"{prefix}k_proj_weight": k, f"{prefix}v_proj_weight": v, **biases}
