"""OpenCLIP 4's modern text tower and its decoder in OpenCLIP's files."""

from collections.abc import Mapping
from typing import Any

from coca_lit.models.coca import CoCa
from coca_lit.projects.coca2.blocks import Style
from coca_lit.projects.coca2.text import ModernDecoder, ModernTextTower
from coca_lit.weights.open_clip.config_keys import DECODER_KEYS, TEXT_KEYS, Allowed, OpenClipConfig, count
from coca_lit.weights.open_clip.parts import Renaming, Tensors, TextPart, depth
from coca_lit.weights.open_clip.text import crossed_every, decoder_keys, heads_of, text_keys

_STYLE_KEYS: Allowed = {
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
_ALLOWED: dict[str, Allowed] = {
    "text_cfg": {
        **TEXT_KEYS,
        **_STYLE_KEYS,
        "pool_type": ("argmax", "eos", "mean", "map"),
        **dict.fromkeys(("embed_cls", "correct_cls_mask"), (False,)),
    },
    "multimodal_cfg": {**DECODER_KEYS, **_STYLE_KEYS, "cross_attn_ratio": None},
}


class ModernText(TextPart):
    kinds = (ModernTextTower,)
    since = "4"
    names = (
        Renaming("text.norm.", "text.ln_final."),
        Renaming("text.projection.", "text.text_projection."),
        Renaming("text.", "text."),
        Renaming("decoder.norm.", "text_decoder.ln_final."),
        Renaming("decoder.vocabulary.", "text_decoder.lm_head."),
        Renaming("decoder.", "text_decoder."),
    )
    allowed = _ALLOWED
    models = ("coca2-moderntext_ViT-B-32",)

    def arguments(self, theirs: Tensors) -> dict[str, Any]:
        width = theirs["text.token_embedding.weight"].shape[1]
        layers = depth(theirs, "text_decoder.blocks")
        found = {
            "text_tower": "modern",
            # Without a map, OpenCLIP's config says how it pools.
            "text_tower_args": {"pool": "map" if "text.pool.query" in theirs else "eos", **_shapes(theirs, "text")},
            "text_layers": depth(theirs, "text.blocks"),
            "decoder_layers": layers,
            "decoder_args": None,
        }
        norm_of_a_head = theirs.get("text.blocks.0.attn.q_norm.weight")
        if norm_of_a_head is not None:
            found["text_heads"] = width // max(len(norm_of_a_head), 1)
        if layers:
            crossed = [i for i in range(layers) if f"text_decoder.blocks.{i}.xattn.kv.weight" in theirs]
            every = crossed[1] if len(crossed) > 1 else layers
            found["decoder_args"] = {**_shapes(theirs, "text_decoder"), "cross_attention_every": every}
        return found

    def shown(self, arguments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {"text_cfg": {"width": arguments["text_width"], "layers": arguments["text_layers"]}}

    def configured(self, config: OpenClipConfig, arguments: Mapping[str, Any]) -> dict[str, Any]:
        pool = config.text.get("pool_type", "argmax")
        if pool == "argmax":
            pool = "eos"
        found = {
            "text_heads": heads_of(config, arguments),
            "context_length": count(config.text, "context_length", 77),
            "text_tower_args": {**arguments["text_tower_args"], "pool": pool, **_numbers(config.text)},
        }
        if arguments["decoder_args"] is not None:
            every = crossed_every(config, arguments)
            found["decoder_args"] = {
                **arguments["decoder_args"],
                **_numbers(config.decoder),
                "cross_attention_every": every,
            }
        return found

    def sections(self, model: CoCa, version: str) -> dict[str, dict[str, Any]]:
        text: Any = model.text
        keys = {"pool_type": text.pooled, **_style_keys(text.style, text.token_embedding.embedding_dim)}
        sections = {"text_cfg": {**text_keys(model), **keys, **model.tokenizer.open_clip_config}}
        decoder = model.decoder
        if isinstance(decoder, ModernDecoder):
            keys = {"cross_attn_ratio": decoder.every, **_style_keys(decoder.style, decoder.vocabulary.in_features)}
            sections["multimodal_cfg"] = {**decoder_keys(model), **keys}
        return sections


def _shapes(theirs: Tensors, tower: str) -> dict[str, Any]:
    """What the tensors of modern blocks show."""
    width = theirs[f"{tower}.blocks.0.mlp.w3.weight"].shape[0]
    hidden = theirs[f"{tower}.blocks.0.mlp.w3.weight"].shape[1]
    found: dict[str, Any] = {} if hidden == 4 * width else {"mlp_width": hidden}
    found["gated"] = f"{tower}.blocks.0.attn.gate.weight" in theirs
    found["qk_norm"] = f"{tower}.blocks.0.attn.q_norm.weight" in theirs
    return found


def _numbers(section: Mapping[str, Any]) -> dict[str, float]:
    """What the tensors of modern blocks do not show, where it is not the default."""
    found = {"norm_eps": section.get("norm_eps"), "rope_base": section.get("rope_temperature")}
    return {
        name: float(value)
        for name, value in found.items()
        if value is not None and value != Style._field_defaults[name]
    }


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
