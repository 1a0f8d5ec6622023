"""OpenCLIP's files: weights of its captioners from and to ours, weights of its CLIP, and `open_clip_config.json`.

Each part of a model knows the names of its tensors in OpenCLIP (`open_clip_names`) and its keys in the config
(`open_clip_config`); CoCa has the names of open_clip 2.11 to 3.3. Values differ in three ways: projections are stored
transposed there, the packed query/key/value projection of a cross-attention is two matrices here, and temperature and
bias of the contrastive logits are scalars there and vectors of one here. Without a decoder the counterpart of CoCa is
OpenCLIP's `CustomTextCLIP`.

With timm's NaFlexVit, the encoder for images of any shape, the two poolers are siblings of `visual`.

CLIP comes in two layouts: the text tower at the root (`CLIP`), or under `text.` (`CustomTextCLIP`). Both hold the same
tensors. Files with other towers are refused.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from coca_lit.models.clip import CLIP
from coca_lit.models.coca import CoCa
from coca_lit.models.image import CLIP_NORMALISATION, MeanPooling
from coca_lit.models.layers import OpenClipNames, SelfBlock
from coca_lit.models.mammut import TwoPassTower
from coca_lit.models.naflex import DEFAULTS
from coca_lit.tokenizer import get_tokenizer
from coca_lit.weights.open_clip_keys import (
    CLIP_KEYS,
    COCA_KEYS,
    FILE,
    MODERN_KEYS,
    POOLER_KEYS,
    TWO_PASS_KEYS,
    OpenClipConfig,
    count,
    read_config,
    with_tokenizer,
)

_COCA_TRANSPOSED = {
    *("visual.proj", "text.text_projection", "text_decoder.text_projection"),
    *("map_viz2txt_kv", "text.lm_head"),
}
_CROSS_ATTENTION = re.compile(
    r"(decoder\.cross_blocks\.\d+|pooling\.(?:generative|contrastive))\.attention\.(q|kv)\.(weight|bias)"
)
_CLIP_NAMES: OpenClipNames = (
    ("image_projection.weight", "visual.proj", {}),
    ("blocks.", "transformer.resblocks.", SelfBlock.open_clip_names),
    ("position_embedding", "positional_embedding", {}),
    ("norm.", "ln_final.", {}),
    ("text_projection.weight", "text_projection", {}),
    ("token_embedding.", "token_embedding.", {}),
    ("logit_scale", "logit_scale", {}),
)
_TEXT_SIZES = {"context_length": "context_length", "width": "text_width", "layers": "text_layers"}
_CLIP_TRANSPOSED = ("visual.proj", "text_projection")
# OpenCLIP's sizes from ViT-H on have wider heads than 64; the tensors do not show it.
_HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
_CLIP_KIND = "with CLIP's own text transformer (ViT-B-32, ViT-L-14, ViT-H-14, …)"
_OTHER_TOWERS = {
    "visual.layer1.": "its image tower is a ResNet",
    "visual.trunk.": "its image tower is one of timm's",
    "visual.head.": "its image tower is not a CLIP vision transformer",
    "visual.attn_pool.": "its image tower pools by attention, and its text tower does not end in a CLS token",
    "text.blocks.": "its text tower is OpenCLIP 4's modern one",
    "text.transformer.embeddings.": "its text tower is a Hugging Face model",
    "text.transformer.encoder.": "its text tower is a Hugging Face model",
    "text.transformer.shared.": "its text tower is a Hugging Face model",
}
_TOWERS = ("TextTower", "ModernTextTower", "TwoPassTower", "TwoPassTowerWithPads")
VERSIONS = ("3.3", "4")  # of OpenCLIP, whose files can be written
_NAFLEX = "visual.trunk.embeds.proj.weight"  # a tensor that shows timm's NaFlexVit
_BLOCK_PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def to_open_clip(model: CoCa) -> dict[str, Tensor]:
    """State dict that OpenCLIP's model of the same sizes loads strictly.

    Raises:
        ValueError: the model has parts that OpenCLIP's CoCa lacks.
    """
    if model.pooling.open_clip_config is None or not hasattr(model.image_encoder.trunk, "norm_pre"):
        raise ValueError(
            "only a CoCa with a CLIP vision transformer or naflex, and the single pooler or one of OpenCLIP 4, has an"
            " OpenCLIP counterpart"
        )
    state, names = model.state_dict(), _names(model)
    converted = {_rename(name, names): tensor for name, tensor in state.items() if not _CROSS_ATTENTION.fullmatch(name)}
    for ours in {match[1] for name in state if (match := _CROSS_ATTENTION.fullmatch(name))}:
        converted |= _join_cross_attention(state, ours, _rename(f"{ours}.", names))
    for name in converted.keys() & _COCA_TRANSPOSED:
        converted[name] = converted[name].T.contiguous()
    if "visual.class_embedding" in converted:
        converted["visual.class_embedding"] = converted["visual.class_embedding"].flatten()
    for name in ("visual.positional_embedding", "logit_scale", "logit_bias"):
        if name in converted:
            converted[name] = converted[name][0]
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
    if relative := _relative(theirs):
        raise ValueError(
            f"this is {relative}; of OpenCLIP's captioners these can be read, in any size: coca_ViT-L-14, "
            "coca2_ViT-B-32, coca2-moderntext_ViT-B-32, coca2-moderntext-naflex_ViT-B-32, mammut2_ViT-L-14, openMaMMUT"
        )
    pooler = "attn_pool.query" if _NAFLEX in theirs else "visual.attn_pool.query"
    needed = [pooler] if "map_viz2txt_kv" not in theirs else []
    if needed and "text.blocks.0.attn.qkv.weight" not in theirs:
        needed.append("text.cls_emb")
    if missing := [key for key in needed if key not in theirs]:
        raise ValueError(f"this is not an OpenCLIP CoCa checkpoint: it has no tensor '{missing[0]}'")
    sizes = _sizes(theirs)
    if "map_viz2txt_kv" in theirs and "text.lm_head" not in theirs:  # names of the code that trained openMaMMUT
        theirs["text.lm_head"] = theirs["text.text_projection"]
        del theirs["text.text_projection"]
    model = CoCa(**sizes | _coca_arguments(config, sizes) | overrides)
    names = _names(model)
    ours: dict[str, Tensor] = {}
    for name, target in model.state_dict().items():
        tensor = _their_tensor(theirs, name, names)
        if tensor.numel() != target.numel():
            raise ValueError(
                f"'{_rename(name, names)}' has the shape {tuple(tensor.shape)} in the checkpoint, and its "
                f"counterpart '{name}' needs {tuple(target.shape)}"
            )
        ours[name] = tensor.reshape(target.shape).to(target.dtype)
    used = to_open_clip(model).keys()
    if unused := sorted(theirs.keys() - used):
        raise ValueError(f"{len(unused)} tensors of the checkpoint have no place in CoCa, the first is '{unused[0]}'")
    model.load_state_dict(ours)
    return model


def _plain_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict or a training checkpoint, without the prefixes that wrappers add to their names."""
    state = state.get("state_dict", state)
    if not isinstance(state, Mapping):
        raise ValueError(f"the checkpoint's state_dict is a {type(state).__name__}, expected a dictionary of tensors")
    names = {
        re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor
        for name, tensor in state.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    masks = ("text.attn_mask", "text_decoder.attn_mask")  # constants that some versions stored
    return _Tensors((name, tensor) for name, tensor in names.items() if name not in masks)


class _Tensors(dict[str, Tensor]):
    def __missing__(self, name: str) -> Tensor:
        raise ValueError(f"the checkpoint has no tensor '{name}'")


def _relative(theirs: Mapping[str, Tensor]) -> str | None:
    """What a captioner of OpenCLIP that cannot be read is called, and why; None for all other files."""

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in theirs)

    mammut = has("map_viz2txt_kv")
    if mammut and has("text.blocks."):
        return "a MaMMUT with OpenCLIP 4's modern text tower (mammut2-moderntext_…)"
    if mammut and has("visual.trunk."):
        return "a MaMMUT whose image tower is one of timm's (mammut2-naflex_…)"
    if mammut or not has("text_decoder."):
        return None
    if has(*(prefix for prefix in _OTHER_TOWERS if prefix.startswith("text.transformer."))):
        return "a coca_roberta-ViT-B-32, whose text tower is a Hugging Face model and sees the tokens it should predict"
    if _NAFLEX not in theirs and has("visual.trunk.", "visual.layer1."):
        return "a CoCa whose image tower is not a CLIP vision transformer (timm_model_name, or a ResNet)"
    if not has("visual.attn_pool.", "attn_pool."):
        return "a coca_base, which has no attentional pooler"
    return None


def _sizes(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `CoCa` that the tensors show."""
    vocab_size, text_width = theirs["text.token_embedding.weight"].shape
    tokenizer = _tokenizer(vocab_size)
    pooling = _pooling_sizes(theirs)
    if "map_viz2txt_kv" in theirs:
        text = _two_pass_sizes(theirs)
    elif "text.cls_emb" in theirs:
        text = {
            "context_length": len(theirs["text.positional_embedding"]) - 1,
            "cls_mask": "legacy" if pooling["pooler"] == "single" else "correct",
            "text_layers": _depth(theirs, "text.transformer.resblocks"),
            "decoder_layers": _depth(theirs, "text_decoder.resblocks"),
        }
    else:
        text = _modern_sizes(theirs, text_width)
    return {
        **(_naflex_sizes(theirs) if _NAFLEX in theirs else _image_sizes(theirs)),
        **pooling,
        "text_width": text_width,
        "text_heads": max(text_width // 64, 1),
        **({"tokenizer": tokenizer} if tokenizer != "clip" else {}),
        **text,
        "contrastive": "siglip" if "logit_bias" in theirs else "softmax",
    }


def _image_sizes(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of CLIP's vision transformer."""
    width, _, patch, _ = theirs["visual.conv1.weight"].shape
    mlp_width = len(theirs["visual.transformer.resblocks.0.mlp.c_fc.weight"])
    return {
        "image_encoder": "vit_base_patch32_clip_224",
        "image_encoder_args": {
            "patch_size": patch,
            "embed_dim": width,
            "depth": _depth(theirs, "visual.transformer.resblocks"),
            "num_heads": max(width // 64, 1),
            **({"mlp_ratio": mlp_width / width} if mlp_width != 4 * width else {}),
        },
        "image_size": math.isqrt(len(theirs["visual.positional_embedding"]) - 1) * patch,
    }


def _naflex_sizes(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of timm's NaFlexVit. The size of images is not in its tensors: without a config they fill the learned grid."""
    width, pixels = theirs[_NAFLEX].shape
    _, height, columns, _ = theirs["visual.trunk.embeds.pos_embed"].shape
    patch = math.isqrt(pixels // 3)
    registers = theirs.get("visual.trunk.embeds.reg_token")
    found = {
        "embed_dim": width,
        "depth": _depth(theirs, "visual.trunk.blocks"),
        "mlp_ratio": len(theirs["visual.trunk.blocks.0.mlp.fc1.weight"]) / width,
        "reg_tokens": 0 if registers is None else registers.shape[1],
    }
    return {
        "image_encoder": "naflex",
        "image_encoder_args": {
            "patch_size": patch,
            "pre_norm": "visual.trunk.norm_pre.weight" in theirs,
            "pos_embed_grid_size": [height, columns],
            **{name: value for name, value in found.items() if value != DEFAULTS[name]},
        },
        "image_size": height * patch,
    }


def _pooling_sizes(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    if "map_viz2txt_kv" in theirs:
        # The released openMaMMUT, whose tensors have older names, averages the class token too.
        pooler = "mean" if "text.lm_head" in theirs else "mean_all"
        return {"embed_dim": theirs["visual.proj"].shape[1], "pooler": pooler}
    where, kind = ("", "masked") if _NAFLEX in theirs else ("visual.", "openclip")
    queries, embed_dim = theirs[f"{where}attn_pool.query"].shape
    pooler = "single"
    if (context := theirs.get(f"{where}attn_pool_contrastive.ln_k.weight")) is not None:
        # With equal widths both have the same tensors; then the config decides.
        pooler = f"{kind}_cascade" if len(context) == embed_dim else f"{kind}_parallel"
    else:
        embed_dim = theirs["visual.proj"].shape[1]
    return {"embed_dim": embed_dim, "pooler": pooler, "pooler_queries": queries}


def _modern_sizes(theirs: Mapping[str, Tensor], width: int) -> dict[str, Any]:
    def style(tower: str) -> dict[str, Any]:
        found = {
            "mlp_width": theirs[f"{tower}.blocks.0.mlp.w3.weight"].shape[1],
            "gated": f"{tower}.blocks.0.attn.gate.weight" in theirs,
            "qk_norm": f"{tower}.blocks.0.attn.q_norm.weight" in theirs,
        }
        return {name: value for name, value in found.items() if (name, value) != ("mlp_width", 4 * width)}

    head = theirs.get("text.blocks.0.attn.q_norm.weight")
    pool = "mean" if _NAFLEX in theirs else "eos"  # as in OpenCLIP's models; the config says what it is
    layers = _depth(theirs, "text_decoder.blocks")
    crossed = sum(name.endswith(".xattn.kv.weight") for name in theirs)
    return {
        "text_tower": "modern",
        "text_tower_args": {"pool": "map" if "text.pool.query" in theirs else pool, **style("text")},
        "text_layers": _depth(theirs, "text.blocks"),
        **({"text_heads": width // max(len(head), 1)} if head is not None else {}),
        "decoder_layers": layers,
        "decoder_args": style("text_decoder") | _every(layers, crossed) if layers else None,
    }


def _two_pass_sizes(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    layers = _depth(theirs, "text.resblocks")
    return {
        "text_tower": "two_pass" if "text.lm_head" in theirs else "two_pass_with_pads",
        "context_length": len(theirs["text.positional_embedding"]),
        "text_layers": layers,
        "decoder_layers": layers,
        "decoder_args": _every(layers, _depth(theirs, "text.cross_attn")),
    }


def _every(layers: int, crossed: int) -> dict[str, int]:
    """How often a layer of a decoder looks at the image, from their number and that of cross-attentions."""
    return {"cross_attention_every": max(-(-layers // max(crossed, 1)), 1)}


def _tokenizer(vocab_size: int) -> str:
    known = {49408: "clip", 50260: "r50k"}
    if vocab_size not in known:
        raise ValueError(
            f"the checkpoint has a vocabulary of {vocab_size} tokens; only CLIP's 49408 and the 50260 of r50k_base with"
            " three special ids can be read"
        )
    return known[vocab_size]


def _depth(theirs: Mapping[str, Tensor], prefix: str) -> int:
    """Number of blocks whose names start with `prefix`."""
    return len({name.removeprefix(f"{prefix}.").split(".")[0] for name in theirs if name.startswith(f"{prefix}.")})


def _names(model: CoCa) -> OpenClipNames:
    """The names that each part of a model knows for its tensors, and the model's own."""
    parts = {part: getattr(model, part) for part in ("image_encoder", "pooling", "text", "decoder")}
    named = {part: getattr(module, "open_clip_names", ()) for part, module in parts.items()}
    return (
        *((f"{part}.{ours}", theirs, inside) for part, names in named.items() for ours, theirs, inside in names),
        ("image_projection.weight", "visual.proj", {}),
        ("logit_scale", "logit_scale", {}),
        ("logit_bias", "logit_bias", {}),  # of a sigmoid loss only
    )


def _rename(ours: str, names: OpenClipNames) -> str:
    """OpenCLIP's name of one of our tensors, by the first beginning that fits."""
    for our_prefix, their_prefix, inside in names:
        if ours.startswith(our_prefix):
            rest = ours.removeprefix(our_prefix)
            for a, b in inside.items():
                rest = rest.replace(a, b)
            return their_prefix + rest
    raise ValueError(f"'{ours}' has no counterpart in OpenCLIP")


def _their_tensor(theirs: Mapping[str, Tensor], ours: str, names: OpenClipNames) -> Tensor:
    if match := _CROSS_ATTENTION.fullmatch(ours):
        return _split_cross_attention(theirs, _rename(f"{match[1]}.", names), match[2], match[3])
    name = _rename(ours, names)
    if name not in theirs:
        raise ValueError(f"the checkpoint has no tensor '{name}'")
    return theirs[name].T if name in _COCA_TRANSPOSED else theirs[name]


def _split_cross_attention(theirs: Mapping[str, Tensor], module: str, part: str, kind: str) -> Tensor:
    """Weight or bias of the query or the key/value projection of their module, from one packed tensor or three."""
    prefix = f"{module}attn."
    if (
        kind == "weight" and f"{prefix}q_proj_weight" in theirs
    ):  # nn.MultiheadAttention keeps three if context and query widths differ
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


def is_clip(state: Mapping[str, Any]) -> bool:
    """Whether a state dict, or a training checkpoint that holds one, is a CLIP's and not a CoCa's, with or without a
    decoder.
    """
    names = _plain_state(state)
    captioner = ("text_decoder.", "text.cls_emb", "map_viz2txt_kv")
    return "logit_scale" in names and not any(name.startswith(captioner) for name in names)


def clip_from_open_clip(state: Mapping[str, Any], config: Mapping[str, Any] | None = None, **overrides: Any) -> CLIP:
    """Builds the CLIP that an OpenCLIP state dict, or a training checkpoint that holds one, belongs to, and loads it.

    Sizes are read from the tensors, which become fp32 whatever they are stored in. The tensors show neither the numbers
    of heads nor the activation: they come from `config`, the content of the `open_clip_config.json` beside the weights,
    or default to the heads of OpenCLIP's model of that size, and GELU; `overrides`, arguments of `CLIP`, take
    precedence. With the wrong activation everything runs and all scores are slightly wrong.

    Raises:
        ValueError: an architecture that is not supported, or tensors are missing, left over or of the wrong shape.
    """
    tensors = _plain_state(state)
    for prefix, reason in _OTHER_TOWERS.items():
        if any(name.startswith(prefix) for name in tensors):
            raise ValueError(
                f"this OpenCLIP CLIP cannot be read: {reason}; supported are vision transformers {_CLIP_KIND}"
            )
    theirs = _Tensors((name.removeprefix("text."), tensor) for name, tensor in tensors.items() if name != "attn_mask")
    for needed in ("visual.conv1.weight", "visual.proj", "visual.ln_pre.weight", "token_embedding.weight"):
        if needed not in theirs:
            raise ValueError(
                f"this is not an OpenCLIP CLIP with a vision transformer {_CLIP_KIND}: no tensor '{needed}'"
            )
    sizes = _clip_sizes(theirs)
    model = CLIP(**sizes | _clip_arguments(config, sizes) | overrides)
    trunk = ((f"image_encoder.{a}", b, inside) for a, b, inside in model.image_encoder.open_clip_names)
    names = (*trunk, *_CLIP_NAMES)
    ours: dict[str, Tensor] = {}
    for name, target in model.state_dict().items():
        there = _rename(name, names)
        if there not in theirs:
            raise ValueError(f"the checkpoint has no tensor '{there}'")
        tensor = theirs.pop(there)
        tensor = tensor.T if there in _CLIP_TRANSPOSED else tensor
        if tensor.numel() != target.numel():
            raise ValueError(f"tensor '{there}' of the checkpoint has the shape {tuple(tensor.shape)}, unlike a CLIP")
        ours[name] = tensor.reshape(target.shape).to(target.dtype)
    if theirs:
        raise ValueError(f"{len(theirs)} tensors of the checkpoint have no place in CLIP, the first is '{min(theirs)}'")
    model.load_state_dict(ours)
    return model


def _clip_sizes(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    width, _, patch, _ = theirs["visual.conv1.weight"].shape
    grid = math.isqrt(len(theirs["visual.positional_embedding"]) - 1)
    vocab_size, text_width = theirs["token_embedding.weight"].shape
    if _tokenizer(vocab_size) != "clip":
        raise ValueError(f"the checkpoint has a vocabulary of {vocab_size} tokens; of a CLIP only 49408 can be read")
    hidden = len(theirs["visual.transformer.resblocks.0.mlp.c_fc.bias"])
    return {
        "image_encoder_args": {
            "patch_size": patch,
            "embed_dim": width,
            "depth": _depth(theirs, "visual.transformer.resblocks"),
            "num_heads": max(width // _HEAD_WIDTH.get(width, 64), 1),
            "mlp_ratio": hidden / width,
        },
        "image_size": grid * patch,
        "embed_dim": theirs["visual.proj"].shape[1],
        "context_length": len(theirs["positional_embedding"]),
        "text_width": text_width,
        "text_layers": _depth(theirs, "transformer.resblocks"),
        "text_heads": max(text_width // 64, 1),
    }


def _clip_arguments(config: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `CLIP` that only OpenCLIP's config shows; its defaults are OpenCLIP's."""
    if config is None:
        return {}
    found = read_config(config, CLIP_KEYS, _shown(sizes))
    return {
        **_image_arguments(found, sizes),
        "text_heads": count(found.text, "heads", 8),
        "quick_gelu": found.quick_gelu,
        "interpolation": found.interpolation,
        "resize_mode": found.resize_mode,
    }


def open_clip_config(model: CoCa, version: str = "3.3") -> dict[str, Any]:
    """What `open_clip.create_model("local-dir:…")` needs beside the weights.

    OpenCLIP 3.3 has no key for the CLS mask: it always computes the legacy one. The section `coca_lit`, which it
    ignores, stores the mask that the model was trained with. OpenCLIP 4 has a key, at which 3.3 would stop.

    Args:
        version: of OpenCLIP, one of `VERSIONS`.

    Raises:
        ValueError: OpenCLIP cannot build such a model; the message says why.
    """
    if reason := obstacle_to_open_clip(model, version):
        raise ValueError(f"OpenCLIP cannot build this model: {reason}")
    ours, trunk = model.config, model.image_encoder.trunk
    vision = {
        **model.image_encoder.open_clip_config,
        "output_tokens": model.decoder is not None,
        **(model.pooling.open_clip_config or {}),
    }
    if not isinstance(model.pooling, MeanPooling):
        vision |= {"attn_pooler_queries": ours["pooler_queries"], "attn_pooler_heads": ours["pooler_heads"]}
    both = {
        "context_length": ours["context_length"],
        "vocab_size": model.tokenizer.vocab_size,
        "width": ours["text_width"],
        "heads": ours["text_heads"],
        **{key: value for key, value in model.tokenizer.open_clip_config.items() if key.endswith("_id")},
    }
    text = {"layers": ours["text_layers"], "output_tokens": model.decoder is not None, **model.text.open_clip_config}
    text |= model.tokenizer.open_clip_config
    if version == "3.3":
        text.pop("correct_cls_mask", None)
    towers = {} if isinstance(model.text, TwoPassTower) else {"text_cfg": {**both, **text}}
    if model.decoder is not None:
        towers["multimodal_cfg"] = {**both, "layers": ours["decoder_layers"], **model.decoder.open_clip_config}
    normalisation = {key: list(trunk.pretrained_cfg[key]) for key in CLIP_NORMALISATION}
    return {
        "model_cfg": {
            "embed_dim": ours["embed_dim"],
            "vision_cfg": vision,
            **towers,
            **({"custom_text": True} if "text_cfg" in towers else {}),
        },
        "preprocess_cfg": {
            **normalisation,
            **{key: model.preprocessing[key] for key in ("interpolation", "resize_mode")},
        },
        **({"coca_lit": {"cls_mask": ours["cls_mask"]}} if version == "3.3" else {}),
    }


def obstacle_to_open_clip(model: CoCa, version: str = "3.3") -> str | None:
    """Why OpenCLIP's CoCa cannot be this model, whatever its CLS mask; None if it can."""
    ours = model.config
    if model.tokenizer.open_clip_version is None:
        return "it has a word tokenizer, and OpenCLIP's CoCa only reads byte pairs"
    if model.pooling.open_clip_config is None:
        return (
            f"it has the {ours['pooler']} pooler, and OpenCLIP has the single one, and with version=4"
            " openclip_parallel, openclip_cascade and MaMMUT's means"
        )
    if type(model.text).__name__ not in _TOWERS:
        return f"its text tower is a {type(model.text).__name__}, and OpenCLIP has none"
    if isinstance(model.text, TwoPassTower) != isinstance(model.pooling, MeanPooling):
        return "in OpenCLIP a two-pass text tower and the mean of all image tokens go together"
    if isinstance(model.text, TwoPassTower) and model.decoder is None:
        return "OpenCLIP has no MaMMUT without its decoder"
    parts = (model.pooling, model.text, model.tokenizer, model.image_encoder)
    if version == "3.3" and any(part.open_clip_version == "4" for part in parts):
        return "its pooler, tokenizer, image encoder or text tower needs OpenCLIP 4: export it with version=4"
    if not model.image_encoder.takes_patches and not _is_clip_transformer(model.image_encoder.trunk):
        return (
            f"its image encoder is {ours['image_encoder']}, and OpenCLIP's CoCa only has CLIP's vision transformer"
            " (vit_*_clip_*, without QuickGELU), and with version=4 naflex"
        )
    if model.decoder is not None and ours["embed_dim"] != ours["text_width"]:
        return (
            f"OpenCLIP's decoder reads image tokens of its own width, and this one reads tokens of {ours['embed_dim']}"
            f" with a width of {ours['text_width']}"
        )
    return None


def _is_clip_transformer(trunk: nn.Module) -> bool:
    """Whether it computes what OpenCLIP's own VisionTransformer does, up to the pooler."""
    if not isinstance(trunk, VisionTransformer) or trunk.pos_embed is None or len(trunk.blocks) == 0:
        return False
    expected = {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm_pre.weight", "norm_pre.bias"}
    for i in range(len(trunk.blocks)):
        expected |= {f"blocks.{i}.{part}.{kind}" for part in _BLOCK_PARTS for kind in ("weight", "bias")}
    block: Any = trunk.blocks[0]
    positions = trunk.pos_embed.shape[1]
    return (
        trunk.state_dict().keys() == expected
        and type(block.mlp.act).__name__ == "GELU"
        and block.norm1.eps == 1e-5
        and positions == math.isqrt(positions - 1) ** 2 + 1
    )


def _coca_arguments(config: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `CoCa` that only the config shows: numbers of heads, how pixels are prepared, masks and pooling.

    Args:
        config: content of `open_clip_config.json`; None yields what all of OpenCLIP's models of this kind have.
        sizes: the arguments that follow from the tensors.

    Raises:
        ValueError: the config asks for something that CoCa lacks.
    """
    if config is None:
        return {"context_length": 128} if sizes["image_encoder"] == "naflex" else {}
    tower = sizes.get("text_tower")
    keys = COCA_KEYS._replace(vision=POOLER_KEYS.get(sizes["pooler"], COCA_KEYS.vision))
    if tower is not None:
        keys = (MODERN_KEYS if tower == "modern" else TWO_PASS_KEYS)._replace(vision=keys.vision)
    tokenizer = get_tokenizer(sizes.get("tokenizer", "clip"))
    found = read_config(config, with_tokenizer(keys, tokenizer), _shown(sizes))
    if missing := [key for key in tokenizer.open_clip_config if key not in found.text]:
        raise ValueError(f"{FILE} lacks text_cfg.{missing[0]}, which the tokenizer {tokenizer.spec} needs")
    text_heads = count(found.text, "heads", 8)  # these defaults are OpenCLIP's
    decoder_heads = count(found.decoder, "heads", 8 if sizes["decoder_layers"] else text_heads)
    if not found.text and tower is not None:
        text_heads = decoder_heads
    if text_heads != decoder_heads:
        raise ValueError(
            f"the config asks for {text_heads} heads in the text tower and {decoder_heads} in the decoder, but CoCa has"
            " the same number in both"
        )
    if found.quick_gelu:
        raise ValueError("the config asks for QuickGELU, but CoCa is built with GELU")
    image = _naflex_arguments(found, sizes) if sizes["image_encoder"] == "naflex" else _image_arguments(found, sizes)
    arguments = {
        **image,
        "text_heads": text_heads,
        "interpolation": found.interpolation,
        "resize_mode": found.resize_mode,
    }
    if tower is None:
        arguments["cls_mask"] = found.cls_mask
    elif tower == "modern":
        pool = {"argmax": "eos"}.get(found.text.get("pool_type", "argmax"), found.text.get("pool_type"))
        arguments["context_length"] = count(found.text, "context_length", 77)
        arguments["text_tower_args"] = {**sizes["text_tower_args"], "pool": pool, **_style(found.text)}
        if sizes["decoder_args"] is not None:
            arguments["decoder_args"] = {**sizes["decoder_args"], **_style(found.decoder)}
    else:
        arguments["text_tower"] = "two_pass" if found.decoder.get("use_pad_mask", True) else "two_pass_with_pads"
        return arguments | {"pooler": "mean" if found.vision.get("pool_type") == "avg" else "mean_all"}
    kind = found.vision.get("attentional_pool")
    return arguments | {
        "pooler_heads": count(found.vision, "attn_pooler_heads", 8),
        **({"pooler": f"{sizes['pooler'].partition('_')[0]}_{kind}"} if isinstance(kind, str) else {}),
    }


def _style(section: Mapping[str, Any]) -> dict[str, float]:
    """What the tensors of modern blocks do not show, where it is not the default."""
    found = {"norm_eps": section.get("norm_eps", 1e-6), "rope_base": section.get("rope_temperature", 10000.0)}
    return {name: float(value) for name, value in found.items() if value not in (1e-6, 10000)}


def _image_arguments(config: OpenClipConfig, sizes: Mapping[str, Any]) -> dict[str, Any]:
    image = dict(sizes["image_encoder_args"])
    head_width = count(config.vision, "head_width", 64)
    image["num_heads"] = image["embed_dim"] // head_width
    if not image["num_heads"]:
        raise ValueError(f"the config asks for heads of {head_width}, but the image tower is {image['embed_dim']} wide")
    if config.normalisation != CLIP_NORMALISATION:
        image["pretrained_cfg_overlay"] = config.normalisation
    return {"image_encoder_args": image}


def _naflex_arguments(config: OpenClipConfig, sizes: Mapping[str, Any]) -> dict[str, Any]:
    shown = DEFAULTS | {"pre_norm": False, "pos_embed_grid_size": [16, 16]} | sizes["image_encoder_args"]
    given = config.vision.get("timm_model_kwargs") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{FILE}: vision_cfg.timm_model_kwargs must be a dictionary, not a {type(given).__name__}")
    image, heads = dict(sizes["image_encoder_args"]), count(given, "num_heads", DEFAULTS["num_heads"])
    for key, value in given.items():
        if key not in shown:
            raise ValueError(f"{FILE} asks for vision_cfg.timm_model_kwargs.{key}, which coca_lit does not know")
        if key != "num_heads" and value != shown[key]:
            raise ValueError(
                f"{FILE} belongs to other weights: its vision_cfg.timm_model_kwargs.{key} is {value!r}, and the tensors"
                f" show {shown[key]!r}"
            )
    if heads != DEFAULTS["num_heads"]:
        image["num_heads"] = heads
    image_size = count(config.vision, "image_size", 224)
    budget = (image_size // image["patch_size"]) ** 2
    if config.vision.get("image_seq_len") is not None and count(config.vision, "image_seq_len", budget) != budget:
        image["max_patches"] = config.vision["image_seq_len"]
    if config.normalisation != CLIP_NORMALISATION:
        image["pretrained_cfg_overlay"] = config.normalisation
    return {"image_encoder_args": image, "image_size": image_size}


def _shown(sizes: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Sizes that the tensors show, by their keys in OpenCLIP's config."""
    image = sizes["image_encoder_args"]
    vision = {
        "image_size": sizes["image_size"],
        "patch_size": image["patch_size"],
        "width": image.get("embed_dim"),
        "layers": image.get("depth"),
    }
    return {
        "model_cfg": {"embed_dim": sizes["embed_dim"]},
        "vision_cfg": {} if sizes.get("image_encoder") == "naflex" else vision,
        "multimodal_cfg" if str(sizes.get("text_tower")).startswith("two_pass") else "text_cfg": {
            key: sizes[ours] for key, ours in _TEXT_SIZES.items() if ours in sizes
        },
    }
