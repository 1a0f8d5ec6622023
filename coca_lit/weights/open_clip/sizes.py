"""What the tensors of an OpenCLIP file show: whether it can be read, and the arguments of our model.

Numbers of heads are not among them: they follow OpenCLIP's rule, most often 64 channels a head, unless its config says
otherwise.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from coca_lit.models.variants.naflex import DEFAULTS

# OpenCLIP's sizes from ViT-H on have wider heads than 64.
_HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
_NAFLEX = "visual.trunk.embeds.proj.weight"  # a tensor that shows timm's NaFlexVit
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


def coca_sizes(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `CoCa` that the tensors show.

    Raises:
        ValueError: this is not a captioner of OpenCLIP, or one that cannot be read.
    """
    if relative := _relative(theirs):
        raise ValueError(
            f"this is {relative}; of OpenCLIP's captioners these can be read, in any size: coca_ViT-L-14, "
            "coca2_ViT-B-32, coca2-moderntext_ViT-B-32, coca2-moderntext-naflex_ViT-B-32, mammut2_ViT-L-14, openMaMMUT"
        )
    needed = [_pooler_of(theirs)] if "map_viz2txt_kv" not in theirs else []
    if needed and not has_modern_towers(theirs):
        needed.append("text.cls_emb")
    if missing := [key for key in needed if key not in theirs]:
        raise ValueError(f"this is not an OpenCLIP CoCa checkpoint: it has no tensor '{missing[0]}'")
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


def has_modern_towers(theirs: Mapping[str, Tensor]) -> bool:
    """Whether it pools images by attention and has OpenCLIP 4's modern text tower: a CoCa, also without a decoder."""
    return _pooler_of(theirs) in theirs and "text.blocks.0.attn.qkv.weight" in theirs


def _pooler_of(theirs: Mapping[str, Tensor]) -> str:
    """A tensor that an attentional pooler has."""
    return "attn_pool.query" if _NAFLEX in theirs else "visual.attn_pool.query"


def at_the_root(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a CLIP with its text tower at the root.

    Raises:
        ValueError: it has other towers than `CLIP`.
    """
    for prefix, reason in _OTHER_TOWERS.items():
        if any(name.startswith(prefix) for name in tensors):
            raise ValueError(
                f"this OpenCLIP CLIP cannot be read: {reason}; supported are vision transformers {_CLIP_KIND}"
            )
    return {name.removeprefix("text."): tensor for name, tensor in tensors.items() if name != "attn_mask"}


def clip_sizes(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `CLIP` that the tensors show, whose text tower is at the root.

    Raises:
        ValueError: this is not a CLIP, or one with another vocabulary.
    """
    for needed in ("visual.conv1.weight", "visual.proj", "visual.ln_pre.weight", "token_embedding.weight"):
        if needed not in theirs:
            raise ValueError(
                f"this is not an OpenCLIP CLIP with a vision transformer {_CLIP_KIND}: no tensor '{needed}'"
            )
    vocab_size, text_width = theirs["token_embedding.weight"].shape
    if _tokenizer(vocab_size) != "clip":
        raise ValueError(f"the checkpoint has a vocabulary of {vocab_size} tokens; of a CLIP only 49408 can be read")
    image = _image_sizes(theirs)
    del image["image_encoder"]  # it has no other
    return {
        **image,
        "embed_dim": theirs["visual.proj"].shape[1],
        "context_length": len(theirs["positional_embedding"]),
        "text_width": text_width,
        "text_layers": _depth(theirs, "transformer.resblocks"),
        "text_heads": max(text_width // 64, 1),
    }


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
            "num_heads": max(width // _HEAD_WIDTH.get(width, 64), 1),
            **({"mlp_ratio": mlp_width / width} if mlp_width != 4 * width else {}),
            **({"init_values": 1e-4} if "visual.transformer.resblocks.0.ls_1.gamma" in theirs else {}),
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
    crossed = [i for i in range(layers) if f"text_decoder.blocks.{i}.xattn.kv.weight" in theirs]
    every = crossed[1] if len(crossed) > 1 else layers
    return {
        "text_tower": "modern",
        "text_tower_args": {"pool": "map" if "text.pool.query" in theirs else pool, **style("text")},
        "text_layers": _depth(theirs, "text.blocks"),
        **({"text_heads": width // max(len(head), 1)} if head is not None else {}),
        "decoder_layers": layers,
        "decoder_args": style("text_decoder") | {"cross_attention_every": every} if layers else None,
    }


def _two_pass_sizes(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    layers, crossed = _depth(theirs, "text.resblocks"), _depth(theirs, "text.cross_attn")
    # The smallest number that fits: two of six layers look at the image with every third, fourth and fifth.
    every = max(-(-layers // max(crossed, 1)), 1)
    without_mlp = [i for i in range(layers) if f"text.resblocks.{i}.mlp.c_fc.weight" not in theirs]
    if without_mlp:  # those that look at the image
        every = without_mlp[1] if len(without_mlp) > 1 else layers
    return {
        "text_tower": "two_pass" if "text.lm_head" in theirs else "two_pass_with_pads",
        "text_tower_args": {"attention_only_every": every} if without_mlp else None,
        "context_length": len(theirs["text.positional_embedding"]),
        "text_layers": layers,
        "decoder_layers": layers,
        "decoder_args": {"cross_attention_every": every},
    }


def _tokenizer(vocab_size: int) -> str:
    known = {49408: "clip", 50260: "r50k"}
    if vocab_size not in known:
        raise ValueError(f"the checkpoint has a vocabulary of {vocab_size} tokens: expected one of {[*known]}")
    return known[vocab_size]


def _depth(theirs: Mapping[str, Tensor], prefix: str) -> int:
    """Number of blocks whose names start with `prefix`."""
    return len({name.removeprefix(f"{prefix}.").split(".")[0] for name in theirs if name.startswith(f"{prefix}.")})
