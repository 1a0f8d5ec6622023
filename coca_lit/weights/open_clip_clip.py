"""OpenCLIP's CLIP from its state dict: vision transformer, causal text transformer, no captioner.

There are two layouts: the text tower at the root (`CLIP`), or under `text.` (`CustomTextCLIP`). Both hold the same
tensors. Files with other towers are refused.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from coca_lit.models.clip import CLIP
from coca_lit.weights.open_clip import BLOCK, TRUNK, Parts, check_vocabulary, depth, plain_state, rename
from coca_lit.weights.open_clip_config import CLIP_NORMALISATION

_PARTS: Parts = [
    *TRUNK,
    ("image_encoder.trunk.norm.", "visual.ln_post.", []),
    ("image_projection.weight", "visual.proj", []),
    ("blocks.", "transformer.resblocks.", BLOCK),
    ("position_embedding", "positional_embedding", []),
    ("norm.", "ln_final.", []),
    ("text_projection.weight", "text_projection", []),
    ("token_embedding.", "token_embedding.", []),
    ("logit_scale", "logit_scale", []),
]
_TRANSPOSED = ("visual.proj", "text_projection")
# OpenCLIP's sizes from ViT-H on have wider heads than 64; the tensors do not show it.
_HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
_KIND = "with CLIP's own text transformer (ViT-B-32, ViT-L-14, ViT-H-14, …)"
_OTHERS = {
    "visual.layer1.": "its image tower is a ResNet",
    "visual.trunk.": "its image tower is one of timm's",
    "visual.head.": "its image tower is not a CLIP vision transformer",
    "visual.attn_pool.": "its image tower pools by attention, and its text tower does not end in a CLS token",
    "text.transformer.embeddings.": "its text tower is a Hugging Face model",
    "text.transformer.encoder.": "its text tower is a Hugging Face model",
    "text.transformer.shared.": "its text tower is a Hugging Face model",
}


def is_clip(state: Mapping[str, Any]) -> bool:
    """Whether a state dict, or a training checkpoint that holds one, is a CLIP's and not a CoCa's, even one that has no
    decoder.
    """
    names = plain_state(state)
    return "logit_scale" in names and not any(name.startswith(("text_decoder.", "text.cls_emb")) for name in names)


def clip_from_open_clip(state: Mapping[str, Any], config: Mapping[str, Any] | None = None, **overrides: Any) -> CLIP:
    """Builds the CLIP that an OpenCLIP state dict, or a training checkpoint that holds one, belongs to, and loads it.

    Sizes are read from the tensors, which become fp32 whatever they are stored in. The tensors tell neither numbers of
    heads nor the activation: they come from `config`, the content of the `open_clip_config.json` beside the weights, or
    are those of OpenCLIP's sizes and GELU; `overrides`, arguments of `CLIP`, have the last word. With the wrong
    activation everything runs and all scores are a little off.

    Raises:
        ValueError: an architecture that is not supported, or tensors are missing, left over or of the wrong shape.
    """
    names = plain_state(state)
    for prefix, reason in _OTHERS.items():
        if any(name.startswith(prefix) for name in names):
            raise ValueError(f"this OpenCLIP CLIP cannot be read: {reason}; supported are vision transformers {_KIND}")
    theirs = {name.removeprefix("text."): tensor for name, tensor in names.items() if name != "attn_mask"}
    for needed in ("visual.conv1.weight", "visual.proj", "visual.ln_pre.weight", "token_embedding.weight"):
        if needed not in theirs:
            raise ValueError(f"this is not an OpenCLIP CLIP with a vision transformer {_KIND}: no tensor '{needed}'")
    sizes = _sizes_of(theirs)
    model = CLIP(**sizes | _arguments_of(config, sizes) | overrides)
    ours: dict[str, Tensor] = {}
    for name, target in model.state_dict().items():
        there = rename(name, _PARTS)
        if there not in theirs:
            raise ValueError(f"the checkpoint has no tensor '{there}'")
        tensor = theirs.pop(there)
        tensor = tensor.T if there in _TRANSPOSED else tensor
        if tensor.numel() != target.numel():
            raise ValueError(f"tensor '{there}' of the checkpoint has the shape {tuple(tensor.shape)}, unlike a CLIP")
        ours[name] = tensor.reshape(target.shape).to(target.dtype)
    if theirs:
        raise ValueError(f"{len(theirs)} tensors of the checkpoint have no place in CLIP, the first is '{min(theirs)}'")
    model.load_state_dict(ours)
    return model


def _sizes_of(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    width, _, patch, _ = theirs["visual.conv1.weight"].shape
    grid = math.isqrt(len(theirs["visual.positional_embedding"]) - 1)
    vocab_size, text_width = theirs["token_embedding.weight"].shape
    check_vocabulary(vocab_size)
    hidden = len(theirs["visual.transformer.resblocks.0.mlp.c_fc.bias"])
    return {
        "image_encoder_args": {
            "patch_size": patch,
            "embed_dim": width,
            "depth": depth(theirs, "visual.transformer.resblocks"),
            "num_heads": max(width // _HEAD_WIDTH.get(width, 64), 1),
            "mlp_ratio": hidden / width,
        },
        "image_size": grid * patch,
        "embed_dim": theirs["visual.proj"].shape[1],
        "context_length": len(theirs["positional_embedding"]),
        "text_width": text_width,
        "text_layers": depth(theirs, "transformer.resblocks"),
        "text_heads": max(text_width // 64, 1),
    }


def _arguments_of(config: Mapping[str, Any] | None, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `CLIP` that only OpenCLIP's config tells; its defaults are OpenCLIP's."""
    if config is None:
        return {}
    model = config.get("model_cfg", {})
    image = dict(sizes["image_encoder_args"])
    image["num_heads"] = image["embed_dim"] // model.get("vision_cfg", {}).get("head_width", 64)
    given = config.get("preprocess_cfg", {})
    normalisation = {key: list(given.get(key, value)) for key, value in CLIP_NORMALISATION.items()}
    if normalisation != CLIP_NORMALISATION:
        image["pretrained_cfg_overlay"] = normalisation
    heads = model.get("text_cfg", {}).get("heads", 8)
    return {"image_encoder_args": image, "text_heads": heads, "quick_gelu": bool(model.get("quick_gelu", False))}
