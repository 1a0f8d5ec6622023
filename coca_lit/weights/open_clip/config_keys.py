"""The keys of an `open_clip_config.json`: each one is honoured or refused, none is ignored that changes a number.

The tables list what open_clip 3.3 and 4 know in each section. A key whose value shows in the tensors, or that has no
effect on what a trained model computes, may have any value; of the others those are listed that coca_lit computes. A
part of a model, see `parts`, takes a table and says where it differs.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from coca_lit.errors import check_number, suggest
from coca_lit.models.image import CLIP_NORMALISATION

FILE = "open_clip_config.json"
Allowed = Mapping[str, tuple[Any, ...] | None]  # None: any value

_SCALES = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
BLOCK_KEYS: Allowed = {
    "act_kwargs": (None, {}, {"approximate": "none"}),
    "norm_kwargs": (None, {}, {"eps": 1e-5}),
    "block_type": (None, "default"),
    "ls_init_value": (None,),
    **dict.fromkeys(_SCALES, (None, False)),
}
VISION_KEYS: Allowed = {
    **BLOCK_KEYS,
    # sizes, which the tensors show or which are read here
    **dict.fromkeys(("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"), None),
    **dict.fromkeys(("attn_pooler_queries", "attn_pooler_heads", "no_ln_pre", "pos_embed_type"), None),
    # of training, of the form of the output, or of a norm that commutes with choosing the class token
    **dict.fromkeys(("patch_dropout", "output_tokens", "final_ln_after_pool"), None),
    "timm_model_name": (None, ""),
    # read with timm_model_name alone
    **dict.fromkeys(("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop"), None),
    **dict.fromkeys(("timm_drop_path", "timm_model_kwargs", "naflex_patch_interp", "image_seq_len"), None),
}
TEXT_KEYS: Allowed = {
    **BLOCK_KEYS,
    **dict.fromkeys(("context_length", "vocab_size", "width", "heads", "layers", "embed_cls"), None),
    "mlp_ratio": (4,),
    "no_causal_mask": (False,),
    "pad_id": (0,),
    "proj_bias": (False,),
    "proj_type": ("linear",),
    "hf_model_name": (None, ""),
    "hf_tokenizer_name": (None, ""),
    "tokenizer_type": (None, ""),
    "tokenizer_kwargs": (None, {}),
    "text_arch": ("clip",),
    "variable_text": (False,),
    "attention_mode": ("causal",),
    # of the form of the output, or read with a key that is refused
    **dict.fromkeys(("output_tokens", "final_ln_after_pool", "use_pad_mask", "tokenizer_mode", "tiktoken_name"), None),
    **dict.fromkeys(("hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "bos_id", "eos_id"), None),
    **dict.fromkeys(("tiktoken_bpe_path", "tiktoken_config_path", "pos_embed", "rope_temperature"), None),
    **dict.fromkeys(("mlp_type", "norm_type", "norm_eps", "attn_gated", "gate_bias", "attention_bias"), None),
    **dict.fromkeys(("mlp_bias", "pre_norm", "norm_placement", "zero_init_residual", "reg_tokens"), None),
    **dict.fromkeys(("value_residual", "freeze_pad_embed"), None),
}
# The classic decoder has no embedding, no pooling and a fixed width of its MLPs: it reads none of these keys.
_UNREAD = ("mlp_ratio", "pad_id", "proj_bias", "proj_type", "pool_type", "embed_cls", "correct_cls_mask", "dim_head")
DECODER_KEYS: Allowed = {
    **TEXT_KEYS,
    **dict.fromkeys((*_UNREAD, "n_queries", "attn_pooler_heads"), None),
    "cross_attn_ratio": (1,),
    "tie_lm_head": (False,),
}
MODEL_KEYS: Allowed = {
    **dict.fromkeys(("embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "custom_text", "quick_gelu"), None),
    # initial values, and how temperature and bias are stored
    **dict.fromkeys(("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "output_dict"), None),
    "pad_id": (0,),
}
PREPROCESS_KEYS: Allowed = {
    **dict.fromkeys(("size", "mean", "std", "resize_mode"), None),  # the size is that of the model
    "interpolation": ("bicubic", "bilinear", "random"),  # random is of training; its evaluation is bicubic
    "mode": ("RGB",),
    "fill_color": (0,),
}


class OpenClipConfig(NamedTuple):
    """The sections of a config, and what belongs to no part."""

    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    decoder: Mapping[str, Any]
    own: Mapping[str, Any]  # what coca_lit adds
    quick_gelu: bool
    normalisation: dict[str, list[float]]
    interpolation: str
    resize_mode: str


def model_section(config: Any) -> Mapping[str, Any]:
    """The section `model_cfg` of a config file, which may be all of it.

    Raises:
        ValueError: it is no dictionary.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"{FILE} must be a dictionary, not a {type(config).__name__}")
    if "model_cfg" in config or "vision_cfg" not in config:
        return section_of(config, "model_cfg")
    return {key: value for key, value in config.items() if key not in ("preprocess_cfg", "coca_lit")}


def read_config(
    config: Mapping[str, Any],
    model: Mapping[str, Any],
    allowed: Mapping[str, Allowed],
    shown: Mapping[str, Mapping[str, Any]],
) -> OpenClipConfig:
    """The content of a config file, checked.

    Args:
        model: its section `model_cfg`.
        allowed: section -> key -> the values that a model of this kind may have.
        shown: section -> key -> what the tensors show.

    Raises:
        ValueError: a key that nobody knows, or a value that coca_lit does not compute; the message names it.
    """
    sections = {name: section_of(model, name) for name in ("vision_cfg", "text_cfg", "multimodal_cfg")}
    sections["preprocess_cfg"] = section_of(config, "preprocess_cfg")
    _check(model, MODEL_KEYS)
    for name, section in sections.items():
        _check(section, PREPROCESS_KEYS if name == "preprocess_cfg" else allowed[name], f"{name}.")
    for name, values in shown.items():
        section = sections.get(name, model)
        for key, value in values.items():
            if key in section and section[key] not in (value, [value, value]):
                where = f"{name}.{key}" if name in sections else key
                raise ValueError(
                    f"{FILE} belongs to other weights: its {where} is {section[key]!r}, and the tensors show {value}"
                )
    pixels = sections["preprocess_cfg"]
    return OpenClipConfig(
        vision=sections["vision_cfg"],
        text=sections["text_cfg"],
        decoder=sections["multimodal_cfg"],
        own=section_of(config, "coca_lit"),
        quick_gelu=bool(model.get("quick_gelu", False)),
        normalisation={key: _channels(pixels, key) for key in CLIP_NORMALISATION},
        interpolation="bilinear" if pixels.get("interpolation") == "bilinear" else "bicubic",
        resize_mode=pixels.get("resize_mode", "shortest"),
    )


def count(section: Mapping[str, Any], key: str, default: int) -> int:
    """A number of a section that must be whole and positive."""
    value = section.get(key, default)
    check_number(f"{FILE}: {key}", value, whole=True, at_least=1)
    return value


def section_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a config; empty if there is none."""
    found = config.get(name, {})
    if not isinstance(found, Mapping):
        raise ValueError(f"{FILE}: {name} must be a dictionary, not a {type(found).__name__}")
    return found


def _check(section: Mapping[str, Any], known: Allowed, prefix: str = "") -> None:
    for key, value in section.items():
        if key not in known:
            raise ValueError(f"{FILE} has the key '{prefix}{key}', which coca_lit does not know{suggest(key, known)}")
        allowed = known[key]
        if allowed is not None and value not in allowed:
            computed = " or ".join(map(repr, allowed))
            raise ValueError(f"{FILE} asks for {prefix}{key} = {value!r}, and coca_lit supports only {computed}")


def _channels(section: Mapping[str, Any], key: str) -> list[float]:
    value = section.get(key, CLIP_NORMALISATION[key])
    value = value if isinstance(value, list | tuple) else [value] * 3
    if len(value) != 3 or not all(isinstance(x, int | float) and math.isfinite(x) for x in value):
        raise ValueError(f"{FILE}: preprocess_cfg.{key} must be three numbers, got {value!r}")
    if key == "std" and not all(x > 0 for x in value):
        raise ValueError(f"{FILE}: preprocess_cfg.std must be above 0, got {value!r}")
    return [float(x) for x in value]
