"""What OpenCLIP calls the parts of a CoCa: the names of their tensors, and their keys in `open_clip_config.json`.

A part is found by its class or the nearest one above it, so a tower registered from outside has what its base has.
"""

from typing import Any

from torch import nn

from coca_lit.models.image import ImageEncoder, ImagePooling
from coca_lit.models.text import ClassicDecoder, TextTower
from coca_lit.models.variants.mammut import TwoPassDecoder, TwoPassTower
from coca_lit.models.variants.modern import ModernDecoder, ModernTextTower, Style
from coca_lit.models.variants.naflex import DEFAULTS, TIMM_NAME, NaFlexEncoder
from coca_lit.models.variants.poolers import MaskedPooling, MeanPooling, OpenClipPooling

# (beginning of names in a part, beginning of their names in OpenCLIP, {name inside: OpenCLIP's})
Names = tuple[tuple[str, str, dict[str, str]], ...]

SELF_BLOCK = {
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "attention.qkv.": "attn.in_proj_",
    "attention.out": "attn.out_proj",
    "mlp.0": "mlp.c_fc",
    "mlp.2": "mlp.c_proj",
}
_CROSS_BLOCK = {**SELF_BLOCK, "norm_context": "ln_1_kv"}
_QUERY_POOLER = {"norm_query": "ln_q", "norm_context": "ln_k", "attention.out": "attn.out_proj"}
_TRUNK_BLOCK = {
    "ls1": "ls_1",
    "ls2": "ls_2",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}

_NAMES: dict[type[nn.Module], Names] = {
    ImageEncoder: (  # CLIP's vision transformers
        ("trunk.blocks.", "visual.transformer.resblocks.", _TRUNK_BLOCK),
        ("trunk.patch_embed.proj.", "visual.conv1.", {}),
        ("trunk.norm_pre.", "visual.ln_pre.", {}),
        ("trunk.cls_token", "visual.class_embedding", {}),
        ("trunk.pos_embed", "visual.positional_embedding", {}),
        ("trunk.norm.", "visual.ln_post.", {}),  # of a CLIP
    ),
    NaFlexEncoder: (("trunk.", "visual.trunk.", {}),),
    ImagePooling: (  # the single pooler
        ("generative.norm_out.", "visual.ln_post.", {}),
        ("generative.", "visual.attn_pool.", _QUERY_POOLER),
    ),
    OpenClipPooling: (
        ("norm.", "visual.ln_post.", {}),
        ("generative.", "visual.attn_pool.", _QUERY_POOLER),
        ("contrastive.", "visual.attn_pool_contrastive.", _QUERY_POOLER),
    ),
    MaskedPooling: (
        ("norm.", "pool_norm.", {}),
        ("generative.", "attn_pool.", _QUERY_POOLER),
        ("contrastive.", "attn_pool_contrastive.", _QUERY_POOLER),
    ),
    MeanPooling: (("norm.", "visual.ln_post.", {}), ("to_text.weight", "map_viz2txt_kv", {})),
    TextTower: (
        ("blocks.", "text.transformer.resblocks.", SELF_BLOCK),
        ("position_embedding", "text.positional_embedding", {}),
        ("cls_embedding", "text.cls_emb", {}),
        ("norm.", "text.ln_final.", {}),
        ("projection.weight", "text.text_projection", {}),
        ("token_embedding.", "text.token_embedding.", {}),
    ),
    ModernTextTower: (
        ("norm.", "text.ln_final.", {}),
        ("projection.", "text.text_projection.", {}),
        ("", "text.", {}),
    ),
    TwoPassTower: (
        ("blocks.", "text.resblocks.", SELF_BLOCK),
        ("position_embedding", "text.positional_embedding", {}),
        ("norm.", "text.ln_final.", {}),
        ("token_embedding.", "text.token_embedding.", {}),
    ),
    ClassicDecoder: (
        ("self_blocks.", "text_decoder.resblocks.", SELF_BLOCK),
        ("cross_blocks.", "text_decoder.cross_attn.", _CROSS_BLOCK),
        ("norm.", "text_decoder.ln_final.", {}),
        ("vocabulary.weight", "text_decoder.text_projection", {}),
    ),
    ModernDecoder: (
        ("norm.", "text_decoder.ln_final.", {}),
        ("vocabulary.", "text_decoder.lm_head.", {}),
        ("", "text_decoder.", {}),
    ),
    TwoPassDecoder: (
        ("cross_blocks.", "text.cross_attn.", _CROSS_BLOCK),
        ("vocabulary.weight", "text.lm_head", {}),
    ),
}


def names_of(part: nn.Module | None) -> Names:
    """The names of the tensors of a part, ours and OpenCLIP's; none for a part that OpenCLIP lacks."""
    return next((_NAMES[kind] for kind in type(part).__mro__ if kind in _NAMES), ())


def needs_version_4(part: nn.Module) -> bool:
    """Whether OpenCLIP 3.3 lacks the part."""
    return isinstance(part, NaFlexEncoder) or not isinstance(part, ImageEncoder | ImagePooling | TextTower)


def keys_of(part: nn.Module) -> dict[str, Any] | None:
    """The keys of a part in its section of OpenCLIP's config, besides sizes that all of its kind have; None if OpenCLIP
    has no such part.
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
            return {"attentional_pool": "parallel" if part.parallel else "cascade"}
        case ImagePooling(variant="single"):
            return {"attentional_pool": True}
        case TextTower():
            return {"embed_cls": True, "correct_cls_mask": part.cls_mask == "correct"}
        case ModernTextTower():
            return {"pool_type": part.pooled, **_style(part.style, part.token_embedding.embedding_dim)}
        case ModernDecoder():
            return {"cross_attn_ratio": part.every, **_style(part.style, part.vocabulary.in_features)}
        case TwoPassDecoder():
            return {
                "cross_attn_ratio": part.every,
                "pool_type": "avg",
                "use_pad_mask": part.tower.pad_mask,
                "proj_type": "none",
            }
    return None


def _style(style: Style, width: int) -> dict[str, Any]:
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
