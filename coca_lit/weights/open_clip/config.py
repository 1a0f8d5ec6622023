"""`open_clip_config.json`: written for a model of ours, and read for what the tensors beside it do not show.

`keys` says which keys of the file may have which values.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from coca_lit.models.coca import CoCa
from coca_lit.models.image import CLIP_NORMALISATION, ImageEncoder
from coca_lit.models.poolers import AttentionalPooler, MeanPooling, OpenClipPooling, SinglePooling
from coca_lit.models.registry import NORMALISATION
from coca_lit.models.text import TextTower
from coca_lit.models.variants.mammut import TwoPassDecoder, TwoPassTower, TwoPassTowerWithPads
from coca_lit.models.variants.modern import ModernDecoder, ModernTextTower, Style
from coca_lit.models.variants.naflex import DEFAULTS, TIMM_NAME, NaFlexEncoder
from coca_lit.tokenizer import get_tokenizer
from coca_lit.weights.open_clip.config_keys import (
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

VERSIONS = ("3.3", "4", "mammut")  # of OpenCLIP, whose files can be written; mammut: LAION-AI/open_clip_mammut
_TOWERS = ("TextTower", "ModernTextTower", "TwoPassTower", "TwoPassTowerWithPads")
_TEXT_SIZES = {"context_length": "context_length", "width": "text_width", "layers": "text_layers"}
_BLOCK_PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


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
        **_keys_of(model.image_encoder),
        "output_tokens": model.decoder is not None,
        **_keys_of(model.pooling),
    }
    both = {
        "context_length": ours.context_length,
        "vocab_size": model.tokenizer.vocab_size,
        "width": ours.text_width,
        "heads": ours.text_heads,
        **{key: value for key, value in model.tokenizer.open_clip_config.items() if key.endswith("_id")},
    }
    text = {"layers": ours.text_layers, "output_tokens": model.decoder is not None, **_keys_of(model.text)}
    text |= model.tokenizer.open_clip_config
    if version == "3.3":
        text.pop("correct_cls_mask", None)
    towers = {} if isinstance(model.text, TwoPassTower) else {"text_cfg": {**both, **text}}
    if version == "mammut":
        text["has_mlp"] = not ours.text_tower_args
        every = cast(TwoPassDecoder, model.decoder).every
        towers["text_cfg"] = {**both, **text, "cross_attn_ratio": every, "does_full_decoding": True}
    elif model.decoder is not None:
        towers["multimodal_cfg"] = {**both, "layers": ours.decoder_layers, **_keys_of(model.decoder)}
    normalisation = {key: list(trunk.pretrained_cfg[key]) for key in CLIP_NORMALISATION}
    return {
        "model_cfg": {
            "embed_dim": ours.embed_dim,
            "vision_cfg": vision,
            **towers,
            **({"custom_text": True} if "text_cfg" in towers else {}),
            # OpenCLIP builds the bias only with an initial value; the weights replace it.
            **({"init_logit_bias": -10.0} if model.logit_bias is not None else {}),
        },
        "preprocess_cfg": {
            **normalisation,
            **{key: model.preprocessing[key] for key in ("interpolation", "resize_mode")},
        },
        **({"coca_lit": {"cls_mask": ours.cls_mask}} if version == "3.3" else {}),
    }


def _keys_of(part: nn.Module) -> dict[str, Any]:
    """The keys of a part in its section of OpenCLIP's config, besides sizes that all of its kind have. What is
    registered from outside has the keys of its base.
    """
    trunk: Any = getattr(part, "trunk", None)
    match part:
        case NaFlexEncoder():
            block = trunk.blocks[0]
            sizes = {
                "patch_size": part.patch_size,
                "embed_dim": part.width,
                "depth": len(trunk.blocks),
                "num_heads": block.attn.num_heads,
                "mlp_ratio": block.mlp.fc1.out_features / part.width,
                "reg_tokens": trunk.num_reg_tokens,
            }
            return {
                "timm_model_name": TIMM_NAME,
                "timm_model_kwargs": {
                    **{key: value for key, value in sizes.items() if key == "patch_size" or value != DEFAULTS[key]},
                    "pre_norm": hasattr(trunk.norm_pre, "weight"),
                    "pos_embed_grid_size": list(trunk.embeds.pos_embed.shape[1:3]),
                },
                "timm_pool": "avg",
                "timm_proj": "linear",
                "image_size": part.image_size,
                "image_seq_len": part.max_patches,
            }
        case ImageEncoder():  # CLIP's vision transformers
            width, heads = trunk.embed_dim, trunk.blocks[0].attn.num_heads
            return {
                "image_size": part.image_size,
                "layers": len(trunk.blocks),
                "width": width,
                "head_width": width // heads,
                "mlp_ratio": trunk.blocks[0].mlp.fc1.out_features / width,
                "patch_size": trunk.patch_embed.patch_size[0],
            }
        case MeanPooling():
            return {"pool_type": "avg" if part.left_out else "avg_all", "final_ln_after_pool": True}
        case OpenClipPooling():
            return {"attentional_pool": "parallel" if part.parallel else "cascade", **_pooler_keys(part.generative)}
        case SinglePooling():
            return {"attentional_pool": True, **_pooler_keys(part.generative)}
        case TextTower():
            return {"embed_cls": True, "correct_cls_mask": part.cls_mask == "correct"}
        case ModernTextTower():
            return {"pool_type": part.pooled, **_style_keys(part.style, part.token_embedding.embedding_dim)}
        case ModernDecoder():
            return {"cross_attn_ratio": part.every, **_style_keys(part.style, part.vocabulary.in_features)}
        case TwoPassDecoder():
            return {
                "cross_attn_ratio": part.every,
                "pool_type": "avg",
                "use_pad_mask": part.tower.pad_mask,
                "proj_type": "none",
            }
    return {}  # also of a pooler that OpenCLIP lacks


def _pooler_keys(pooler: AttentionalPooler) -> dict[str, int]:
    return {"attn_pooler_queries": len(pooler.query), "attn_pooler_heads": pooler.attention.heads}


def _style_keys(style: Style, width: int) -> dict[str, Any]:
    hidden = style.mlp_width
    exact = int(width * (hidden / width)) == hidden  # OpenCLIP cuts the product to a whole number
    return {
        "text_arch": "modern",
        "mlp_ratio": hidden / width if exact else (hidden + 0.5) / width,
        "mlp_type": "swiglu",
        "norm_type": "rmsnorm",
        "norm_eps": style.norm_eps,
        "pos_embed": "rope",
        "rope_temperature": style.rope_base,
        "attn_gated": style.gated,
        "qk_norm": style.qk_norm,
        "freeze_pad_embed": False,
    }


def obstacle_to_open_clip(model: CoCa, version: str = "3.3") -> str | None:
    """Why OpenCLIP's CoCa cannot be this model, whatever its CLS mask; None if it can."""
    ours = model.config
    if model.tokenizer.open_clip_version is None:
        return "it has a tokenizer of its own, and OpenCLIP's CoCa reads byte pairs: safetensors and onnx take it"
    if not _keys_of(model.pooling):
        return (
            f"it has the {ours.pooler} pooler, and OpenCLIP has the single one, and with version=4"
            " openclip_parallel, openclip_cascade and MaMMUT's means"
        )
    if ours.frame_positions:
        return "it has positions for the frames of clips, and OpenCLIP has none"
    if type(model.text).__name__ not in _TOWERS:
        return f"its text tower is a {type(model.text).__name__}, and OpenCLIP has none"
    if isinstance(model.text, TwoPassTower) != isinstance(model.pooling, MeanPooling):
        return "in OpenCLIP a two-pass text tower and the mean of all image tokens go together"
    if isinstance(model.text, TwoPassTower) and model.decoder is None:
        return "OpenCLIP has no MaMMUT without its decoder"
    only = (ours.text_tower_args or {}).get("attention_only_every")
    if version == "mammut":
        if not isinstance(model.text, TwoPassTowerWithPads) or ours.pooler != "mean_all":
            return "version=mammut has only two_pass_with_pads and the pooler mean_all"
        if only not in (None, cast(TwoPassDecoder, model.decoder).every):
            return "in OpenCLIP the blocks without an MLP are those before a cross block"
    elif isinstance(model.text, TwoPassTower) and only is not None:
        return "it has blocks without an MLP: export it with version=mammut"
    old_parts = isinstance(model.pooling, SinglePooling) and isinstance(model.text, TextTower)
    old = old_parts and not isinstance(model.image_encoder, NaFlexEncoder) and model.tokenizer.open_clip_version != "4"
    if version == "3.3" and not old:
        return "its pooler, tokenizer, image encoder or text tower needs OpenCLIP 4: export it with version=4"
    if not model.image_encoder.takes_patches and not _is_clip_transformer(model.image_encoder.trunk):
        return (
            f"its image encoder is {ours.image_encoder}, and OpenCLIP's CoCa only has CLIP's vision transformer"
            " (vit_*_clip_*, without QuickGELU and without parts that CLIP lacks), and with version=4 naflex"
        )
    known = {*DEFAULTS, "pre_norm", "pos_embed_grid_size", "max_patches", NORMALISATION}
    others = {name for name in (ours.image_encoder_args or {}) if name not in known and "drop" not in name}
    if model.image_encoder.takes_patches and others:
        return f"OpenCLIP's config does not say {', '.join(sorted(others))} of an image encoder for any shape"
    if model.decoder is not None and ours.embed_dim != ours.text_width:
        return (
            f"OpenCLIP's decoder reads image tokens of its own width, and this one reads tokens of {ours.embed_dim}"
            f" with a width of {ours.text_width}"
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


def coca_arguments(config: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
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
            f"{FILE}: text tower and decoder have {text_heads} and {decoder_heads} heads, expected as many"
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
            arguments["decoder_args"] = {**sizes["decoder_args"], **_style(found.decoder), **_every(found, sizes)}
    else:
        arguments["decoder_args"] = _every(found, sizes)
        arguments["text_tower"] = "two_pass" if found.decoder.get("use_pad_mask", True) else "two_pass_with_pads"
        return arguments | {"pooler": "mean" if found.vision.get("pool_type") == "avg" else "mean_all"}
    kind = found.vision.get("attentional_pool")
    return arguments | {
        "pooler_heads": count(found.vision, "attn_pooler_heads", 8),
        **({"pooler": f"{sizes['pooler'].partition('_')[0]}_{kind}"} if isinstance(kind, str) else {}),
    }


def clip_arguments(config: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
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


def _style(section: Mapping[str, Any]) -> dict[str, float]:
    """What the tensors of modern blocks do not show, where it is not the default."""
    found = {"norm_eps": section.get("norm_eps"), "rope_base": section.get("rope_temperature")}
    return {
        name: float(value)
        for name, value in found.items()
        if value is not None and value != Style._field_defaults[name]
    }


def _every(config: OpenClipConfig, sizes: Mapping[str, Any]) -> dict[str, int]:
    """Every how many layers the decoder looks at the image; several numbers can fit the same tensors."""
    every, shown = count(config.decoder, "cross_attn_ratio", 1), sizes["decoder_args"]["cross_attention_every"]
    layers = range(sizes["decoder_layers"])
    exact = sizes.get("text_tower_args") and sizes["text_tower"] != "modern"  # blocks without an MLP show which ones
    if len(layers[::every]) != len(layers[::shown]) or (exact and every != shown):
        raise ValueError(
            f"{FILE} belongs to other weights: by its cross_attn_ratio {every}, {len(layers[::every])} of {len(layers)}"
            f" layers look at the image, and in the tensors {len(layers[::shown])} do"
        )
    return {"cross_attention_every": every}


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
        budget = image["max_patches"] = config.vision["image_seq_len"]
    if config.normalisation != CLIP_NORMALISATION:
        image["pretrained_cfg_overlay"] = config.normalisation
    return {"image_encoder_args": image, "image_size": image_size}


def _shown(sizes: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Sizes that the tensors show, by their keys in OpenCLIP's config."""
    image, two_pass = sizes["image_encoder_args"], str(sizes.get("text_tower")).startswith("two_pass")
    text = {key: sizes[ours] for key, ours in _TEXT_SIZES.items() if ours in sizes}
    if two_pass:
        text["has_mlp"] = sizes["text_tower_args"] is None
    vision = {
        "image_size": sizes["image_size"],
        "patch_size": image["patch_size"],
        "width": image.get("embed_dim"),
        "layers": image.get("depth"),
    }
    return {
        "model_cfg": {"embed_dim": sizes["embed_dim"]},
        "vision_cfg": {} if sizes.get("image_encoder") == "naflex" else vision,
        "multimodal_cfg" if two_pass else "text_cfg": text,
    }
