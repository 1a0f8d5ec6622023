"""The keys of an `open_clip_config.json`: each one is honoured or refused, none is ignored that changes a number.

The tables list what open_clip 3.3 and 4 know. A key whose value shows in the tensors, or that has no effect on what a
trained model computes, may have any value; of the others those are listed that coca_lit computes.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from coca_lit.errors import check_number, suggest
from coca_lit.models.image import CLIP_NORMALISATION
from coca_lit.models.variants.naflex import TIMM_NAME
from coca_lit.tokenizer import Tokenizer

FILE = "open_clip_config.json"
_Allowed = Mapping[str, tuple[Any, ...] | None]  # None: any value

_SCALES = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
_BLOCKS: _Allowed = {
    "act_kwargs": (None, {}, {"approximate": "none"}),
    "norm_kwargs": (None, {}, {"eps": 1e-5}),
    "block_type": (None, "default"),
    "ls_init_value": (None,),
    **dict.fromkeys(_SCALES, (None, False)),
}
_VISION: _Allowed = {
    **_BLOCKS,
    # sizes, which the tensors show or which are read here
    **dict.fromkeys(("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"), None),
    **dict.fromkeys(("attn_pooler_queries", "attn_pooler_heads", "no_ln_pre", "pos_embed_type"), None),
    "attentional_pool": (True, False),
    "pool_type": ("tok",),
    # of training, of the form of the output, or of a norm that commutes with choosing the class token
    **dict.fromkeys(("patch_dropout", "output_tokens", "final_ln_after_pool"), None),
    "timm_model_name": (None, ""),
    # read with timm_model_name alone
    **dict.fromkeys(("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop"), None),
    **dict.fromkeys(("timm_drop_path", "timm_model_kwargs", "naflex_patch_interp", "image_seq_len"), None),
}
_TWO_POOLERS: _Allowed = {**_VISION, "attentional_pool": ("parallel", "cascade"), "pool_type": None}
_TEXT: _Allowed = {
    **_BLOCKS,
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
_COCA_TEXT: _Allowed = {**_TEXT, "pool_type": None, "correct_cls_mask": (True, False)}  # its features come from CLS
_CLIP_TEXT: _Allowed = {**_TEXT, "pool_type": ("argmax",), "correct_cls_mask": None}
# The classic decoder has no embedding, no pooling and a fixed width of its MLPs: it reads none of these keys.
_UNREAD = ("mlp_ratio", "pad_id", "proj_bias", "proj_type", "pool_type", "embed_cls", "correct_cls_mask", "dim_head")
_DECODER: _Allowed = {
    **_TEXT,
    **dict.fromkeys((*_UNREAD, "n_queries", "attn_pooler_heads"), None),
    "cross_attn_ratio": (1,),
    "tie_lm_head": (False,),
}
_MODEL: _Allowed = {
    **dict.fromkeys(("embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "custom_text", "quick_gelu"), None),
    # initial values, and how temperature and bias are stored
    **dict.fromkeys(("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "output_dict"), None),
    "pad_id": (0,),
}
_PREPROCESS: _Allowed = {
    **dict.fromkeys(("size", "mean", "std", "resize_mode"), None),  # the size is that of the model
    "interpolation": ("bicubic", "bilinear", "random"),  # random is of training; its evaluation is bicubic
    "mode": ("RGB",),
    "fill_color": (0,),
}


_STYLE: _Allowed = {
    "text_arch": ("modern",),
    **dict.fromkeys(("mlp_ratio", "qk_norm", "attn_gated", "norm_eps", "rope_temperature", "freeze_pad_embed"), None),
    "mlp_type": ("swiglu",),
    "norm_type": (None, "rmsnorm"),
    "pos_embed": ("rope",),
    **dict.fromkeys(("gate_bias", "attention_bias", "mlp_bias"), (None, False)),
    **dict.fromkeys(("pre_norm", "value_residual"), (False,)),
    "norm_placement": ("pre",),
    "zero_init_residual": None,
    "reg_tokens": (0,),
    **dict.fromkeys(("bos_id", "eos_id", "variable_text"), None),
    "norm_kwargs": None,  # of classic blocks
}
_MODERN_TEXT: _Allowed = {
    **_TEXT,
    **_STYLE,
    "pool_type": ("argmax", "eos", "mean", "map"),
    **dict.fromkeys(("embed_cls", "correct_cls_mask"), (False,)),
}
_MODERN_DECODER: _Allowed = {**_DECODER, **_STYLE, "cross_attn_ratio": None}
_TWO_PASS_DECODER: _Allowed = {
    **_TEXT,
    **dict.fromkeys(("cross_attn_ratio", "has_mlp"), None),
    "pool_type": ("avg",),
    "use_pad_mask": (True, False),
    "proj_type": ("none",),
    "embed_cls": (False,),
    **dict.fromkeys(("correct_cls_mask", "dim_head", "n_queries", "attn_pooler_heads"), None),
    "tie_lm_head": (False,),
}
_MEAN: _Allowed = {
    **_VISION,
    "attentional_pool": (False,),
    "pool_type": ("avg", "avg_all"),
    "final_ln_after_pool": (True,),
}
_NAFLEX: _Allowed = {
    **_TWO_POOLERS,
    "timm_model_name": (TIMM_NAME,),
    "timm_model_kwargs": None,  # read here
    "ls_init_value": None,  # of OpenCLIP's own transformer
}
_NOTHING: _Allowed = {}


class Keys(NamedTuple):
    """What the sections of a config may hold."""

    vision: _Allowed
    text: _Allowed
    decoder: _Allowed


CLIP_KEYS = Keys({**_VISION, "ls_init_value": None}, _CLIP_TEXT, _DECODER)  # the tensors show it
COCA_KEYS = Keys(_VISION, _COCA_TEXT, _DECODER)
MODERN_KEYS = Keys(_VISION, _MODERN_TEXT, _MODERN_DECODER)
TWO_PASS_KEYS = Keys(_MEAN, _NOTHING, _TWO_PASS_DECODER)
POOLER_KEYS = {  # of our names of poolers
    **dict.fromkeys(("openclip_parallel", "openclip_cascade"), _TWO_POOLERS),
    **dict.fromkeys(("masked_parallel", "masked_cascade"), _NAFLEX),
    **dict.fromkeys(("mean", "mean_all"), _MEAN),
}


def with_tokenizer(known: Keys, tokenizer: Tokenizer) -> Keys:
    """The keys of a model with this tokenizer, whose values are known."""
    own = {key: (value,) for key, value in tokenizer.open_clip_config.items()}
    return known._replace(text={**known.text, **own}, decoder={**known.decoder, **own}) if own else known


class OpenClipConfig(NamedTuple):
    """What the tensors do not show."""

    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    decoder: Mapping[str, Any]
    quick_gelu: bool
    normalisation: dict[str, list[float]]
    interpolation: str
    resize_mode: str
    cls_mask: str  # correct or legacy


def read_config(config: Any, known: Keys, sizes: Mapping[str, Mapping[str, int]]) -> OpenClipConfig:
    """The content of a config file, checked.

    Args:
        known: the keys and values that a model of this kind may have.
        sizes: section -> key -> what the tensors show.

    Raises:
        ValueError: a key that nobody knows, or a value that coca_lit does not compute; the message names it.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"{FILE} must be a dictionary, not a {type(config).__name__}")
    model = _section(config, "model_cfg") if "model_cfg" in config or "vision_cfg" not in config else config
    if known.text is _NOTHING:
        model = _translated(model)
    vision, text = _section(model, "vision_cfg"), _section(model, "text_cfg")
    decoder, given = _section(model, "multimodal_cfg"), _section(config, "preprocess_cfg")
    keys = {"vision_cfg": known.vision, "text_cfg": known.text, "multimodal_cfg": known.decoder}
    keys["preprocess_cfg"] = _PREPROCESS
    sections = {"vision_cfg": vision, "text_cfg": text, "multimodal_cfg": decoder, "preprocess_cfg": given}
    if known.vision in (_TWO_POOLERS, _NAFLEX) and "attentional_pool" not in vision:
        raise ValueError(f"{FILE} lacks vision_cfg.attentional_pool, and the weights have two attentional poolers")
    _check({k: v for k, v in model.items() if model is not config or k not in ("preprocess_cfg", "coca_lit")}, _MODEL)
    for name, section in sections.items():
        _check(section, keys[name], f"{name}.")
    for name, shown in sizes.items():
        section = sections.get(name, model)
        for key, value in shown.items():
            if key in section and section[key] not in (value, [value, value]):
                where = f"{name}.{key}" if name in sections else key
                raise ValueError(
                    f"{FILE} belongs to other weights: its {where} is {section[key]!r}, and the tensors show {value}"
                )
    own = _section(config, "coca_lit").get("cls_mask")
    mask = "correct" if text.get("correct_cls_mask") else "legacy"
    if own is not None and "correct_cls_mask" in text and own != mask:
        raise ValueError(
            f"{FILE} names two CLS masks: text_cfg.correct_cls_mask stands for {mask!r}, coca_lit.cls_mask is {own!r}"
        )
    return OpenClipConfig(
        vision=vision,
        text=text,
        decoder=decoder,
        quick_gelu=bool(model.get("quick_gelu", False)),
        normalisation={key: _channels(given, key) for key in CLIP_NORMALISATION},
        interpolation="bilinear" if given.get("interpolation") == "bilinear" else "bicubic",
        resize_mode=given.get("resize_mode", "shortest"),
        cls_mask=own or mask,
    )


def _translated(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """A MaMMUT's config with the sections of OpenCLIP 4, from those or from the ones of the released openMaMMUT."""
    text = _section(model, "text_cfg")
    if "multimodal_cfg" in model or not ("does_full_decoding" in text or "cross_attn_ratio" in text):
        return model
    left_out = ("does_full_decoding", "output_tokens", "pool_type", "use_pad_mask", "proj_type")
    decoder = {key: value for key, value in text.items() if key not in left_out}
    vision = {**_section(model, "vision_cfg"), "pool_type": "avg_all", "final_ln_after_pool": True}
    return {
        **{key: value for key, value in model.items() if key not in ("text_cfg", "custom_text")},
        "vision_cfg": vision,
        "multimodal_cfg": decoder | {"pool_type": "avg", "use_pad_mask": False, "proj_type": "none"},
    }


def count(section: Mapping[str, Any], key: str, default: int) -> int:
    """A number of a section that must be whole and positive."""
    value = section.get(key, default)
    check_number(f"{FILE}: {key}", value, whole=True, at_least=1)
    return value


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name, {})
    if not isinstance(found, Mapping):
        raise ValueError(f"{FILE}: {name} must be a dictionary, not a {type(found).__name__}")
    return found


def _check(section: Mapping[str, Any], known: _Allowed, prefix: str = "") -> None:
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
