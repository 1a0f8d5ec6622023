"""OpenCLIP's `open_clip_config.json`: written for a model of ours, and read for what its tensors do not tell."""

import math
from collections.abc import Mapping
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from coca_lit.models.coca import CoCa

CLIP_NORMALISATION = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}
_BLOCK_PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def open_clip_config(model: CoCa) -> dict[str, Any]:
    """What `open_clip.create_model("local-dir:…")` needs beside the weights (open_clip 3.3).

    OpenCLIP has no key for the CLS mask: it always computes the legacy one. The section `coca_lit`, which it does not
    read, says which mask the model was trained with.

    Raises:
        ValueError: OpenCLIP cannot build such a model; the message says why.
    """
    if reason := why_not(model):
        raise ValueError(f"OpenCLIP cannot build this model: {reason}")
    ours, trunk = model.config, model.image_encoder.trunk
    width, heads = trunk.embed_dim, trunk.blocks[0].attn.num_heads
    vision = {
        "image_size": ours["image_size"],
        "layers": len(trunk.blocks),
        "width": width,
        "head_width": width // heads,
        "mlp_ratio": trunk.blocks[0].mlp.fc1.out_features / width,
        "patch_size": trunk.patch_embed.patch_size[0],
        "attentional_pool": True,
        "attn_pooler_queries": ours["pooler_queries"],
        "attn_pooler_heads": ours["pooler_heads"],
        "output_tokens": model.decoder is not None,
    }
    text = {
        "context_length": ours["context_length"],
        "vocab_size": model.tokenizer.vocab_size,
        "width": ours["text_width"],
        "heads": ours["text_heads"],
    }
    tower = {"layers": ours["text_layers"], "embed_cls": True, "output_tokens": model.decoder is not None}
    decoder = {"multimodal_cfg": {**text, "layers": ours["decoder_layers"]}} if model.decoder is not None else {}
    normalisation = {key: list(trunk.pretrained_cfg[key]) for key in CLIP_NORMALISATION}
    return {
        "model_cfg": {
            "embed_dim": ours["embed_dim"],
            "vision_cfg": vision,
            "text_cfg": {**text, **tower},
            **decoder,
            "custom_text": True,
        },
        "preprocess_cfg": {**normalisation, "interpolation": "bicubic", "resize_mode": "shortest"},
        "coca_lit": {"cls_mask": ours["cls_mask"]},
    }


def why_not(model: CoCa) -> str | None:
    """What keeps OpenCLIP's CoCa from being this model, if anything does. The CLS mask is left out of account."""
    ours = model.config
    if ours["tokenizer"] != "clip":
        return "it has a word tokenizer, and OpenCLIP's CoCa reads CLIP's byte pairs only"
    if ours["pooler"] != "single":
        return f"it has the {ours['pooler']} pooler, and OpenCLIP's CoCa works with the single one only"
    if not _is_clip_transformer(model.image_encoder.trunk):
        return (
            f"its image encoder is {ours['image_encoder']}, and OpenCLIP's CoCa takes CLIP's vision transformer only"
            " (vit_*_clip_*, without QuickGELU)"
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


def arguments_of(config: Mapping[str, Any] | None, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `CoCa` that only the config tells: numbers of heads, normalisation, and the CLS mask in ours.

    Args:
        config: content of `open_clip_config.json`; None gives no arguments.
        sizes: the arguments that follow from the tensors.

    Raises:
        ValueError: the config asks for something that CoCa has not.
    """
    if config is None:
        return {}
    model = config.get("model_cfg", {})
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    text_heads = text.get("heads", 8)  # these defaults are OpenCLIP's
    decoder_heads = model.get("multimodal_cfg", {}).get("heads", 8 if sizes["decoder_layers"] else text_heads)
    if text_heads != decoder_heads:
        raise ValueError(
            f"the config asks for {text_heads} heads in the text tower and {decoder_heads} in the decoder, and CoCa has"
            " the same number in both"
        )
    if model.get("quick_gelu"):
        raise ValueError("the config asks for QuickGELU, and CoCa is built with GELU")
    image = dict(sizes["image_encoder_args"])
    image["num_heads"] = image["embed_dim"] // vision.get("head_width", 64)
    normalisation = CLIP_NORMALISATION | {
        key: list(value) for key, value in config.get("preprocess_cfg", {}).items() if key in CLIP_NORMALISATION
    }
    if normalisation != CLIP_NORMALISATION:
        image["pretrained_cfg_overlay"] = normalisation
    return {
        "image_encoder_args": image,
        "pooler_heads": vision.get("attn_pooler_heads", 8),
        "text_heads": text_heads,
        "cls_mask": config.get("coca_lit", {}).get("cls_mask", "legacy"),
    }
