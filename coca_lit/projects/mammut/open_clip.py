"""MaMMUT in OpenCLIP's files: of version 4 (its main branch), and of LAION-AI/open_clip_mammut, which trained the
released openMaMMUT.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from coca_lit.models.coca import CoCa
from coca_lit.projects.mammut.pooling import MeanPooling, MeanPoolingWithClassToken
from coca_lit.projects.mammut.text import TwoPassDecoder, TwoPassTower, TwoPassTowerWithPads
from coca_lit.weights.open_clip.config_keys import FILE, TEXT_KEYS, Allowed, OpenClipConfig, count, section_of
from coca_lit.weights.open_clip.parts import PoolerPart, Renaming, Tensors, TextPart, depth
from coca_lit.weights.open_clip.text import CROSS_BLOCK, SELF_BLOCK, crossed_every, decoder_keys, text_keys

_VERSIONS = {**TextPart.versions, "mammut": "LAION-AI/open_clip_mammut"}
_POOLER_KEYS: dict[str, Allowed] = {
    "vision_cfg": {"attentional_pool": (False,), "pool_type": ("avg", "avg_all"), "final_ln_after_pool": (True,)},
}
_TEXT_KEYS: dict[str, Allowed] = {
    "text_cfg": {},
    "multimodal_cfg": {
        **TEXT_KEYS,
        **dict.fromkeys(("cross_attn_ratio", "has_mlp"), None),
        "pool_type": ("avg",),
        "use_pad_mask": (True, False),
        "proj_type": ("none",),
        "embed_cls": (False,),
        **dict.fromkeys(("correct_cls_mask", "dim_head", "n_queries", "attn_pooler_heads"), None),
        "tie_lm_head": (False,),
    },
}
_TOGETHER = "in OpenCLIP a two-pass text tower and the mean of all image tokens go together"


class MeanPooler(PoolerPart):
    kinds = (MeanPooling, MeanPoolingWithClassToken)
    since = "4"
    names = (
        Renaming("pooling.norm.", "visual.ln_post."),
        Renaming("pooling.to_text.weight", "map_viz2txt_kv"),
    )
    transposed = ("map_viz2txt_kv",)
    allowed = _POOLER_KEYS

    def arguments(self, theirs: Tensors) -> dict[str, Any]:
        # The released openMaMMUT, whose tensors have older names, averages the class token too.
        pooler = "mean" if "text.lm_head" in theirs else "mean_all"
        return {"embed_dim": theirs["visual.proj"].shape[1], "pooler": pooler}

    def configured(self, config: OpenClipConfig, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"pooler": "mean" if config.vision.get("pool_type") == "avg" else "mean_all"}

    def keys(self, pooling: MeanPooling) -> dict[str, Any]:
        return {"pool_type": "avg_all" if pooling.class_token else "avg", "final_ln_after_pool": True}

    def obstacle(self, model: CoCa, version: str) -> str | None:
        return None if isinstance(model.text, TwoPassTower) else _TOGETHER

    def unreadable(self, theirs: Collection[str]) -> str | None:
        if any(name.startswith("text.blocks.") for name in theirs):
            return "a MaMMUT with OpenCLIP 4's modern text tower (mammut2-moderntext_…)"
        if any(name.startswith("visual.trunk.") for name in theirs):
            return "a MaMMUT whose image tower is one of timm's (mammut2-naflex_…)"
        return None


class TwoPassText(TextPart):
    """The config has one section for tower and decoder: `multimodal_cfg`, or `text_cfg` in open_clip_mammut."""

    kinds = (TwoPassTower, TwoPassTowerWithPads)
    since = "4"
    versions = _VERSIONS
    names = (
        Renaming("text.blocks.", "text.resblocks.", SELF_BLOCK),
        Renaming("text.position_embedding", "text.positional_embedding"),
        Renaming("text.norm.", "text.ln_final."),
        Renaming("text.token_embedding.", "text.token_embedding."),
        Renaming("decoder.cross_blocks.", "text.cross_attn.", CROSS_BLOCK),
        Renaming("decoder.vocabulary.weight", "text.lm_head"),
    )
    transposed = ("text.lm_head",)
    allowed = _TEXT_KEYS
    models = ("mammut2_ViT-L-14", "openMaMMUT")

    def arguments(self, theirs: Tensors) -> dict[str, Any]:
        layers, crossed = depth(theirs, "text.resblocks"), depth(theirs, "text.cross_attn")
        # The smallest number that fits: two of six layers look at the image with every third, fourth and fifth.
        every = max(-(-layers // max(crossed, 1)), 1)
        tower_args = None
        without_mlp = [i for i in range(layers) if f"text.resblocks.{i}.mlp.c_fc.weight" not in theirs]
        if without_mlp:  # those that look at the image
            every = without_mlp[1] if len(without_mlp) > 1 else layers
            tower_args = {"attention_only_every": every}
        return {
            "text_tower": "two_pass" if "text.lm_head" in theirs else "two_pass_with_pads",
            "text_tower_args": tower_args,
            "context_length": len(theirs["text.positional_embedding"]),
            "text_layers": layers,
            "decoder_layers": layers,
            "decoder_args": {"cross_attention_every": every},
        }

    def shown(self, arguments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {
            "multimodal_cfg": {
                "context_length": arguments["context_length"],
                "width": arguments["text_width"],
                "layers": arguments["text_layers"],
                "has_mlp": arguments["text_tower_args"] is None,
            }
        }

    def configured(self, config: OpenClipConfig, arguments: Mapping[str, Any]) -> dict[str, Any]:
        every = crossed_every(config, arguments)
        shown = arguments["decoder_args"]["cross_attention_every"]
        if arguments["text_tower_args"] is not None and every != shown:  # blocks without an MLP are those before one
            raise ValueError(
                f"{FILE} belongs to other weights: its cross_attn_ratio is {every}, and the tensors show {shown}"
            )
        return {
            "text_heads": count(config.decoder, "heads", 8),
            "text_tower": "two_pass" if config.decoder.get("use_pad_mask", True) else "two_pass_with_pads",
            "decoder_args": {"cross_attention_every": every},
        }

    def obstacle(self, model: CoCa, version: str) -> str | None:
        decoder = model.decoder
        if not isinstance(model.pooling, MeanPooling):
            return _TOGETHER
        if not isinstance(decoder, TwoPassDecoder):
            return "OpenCLIP has no MaMMUT without its decoder"
        without_mlp = (model.config.text_tower_args or {}).get("attention_only_every")
        if version != "mammut":
            return None if without_mlp is None else "it has blocks without an MLP: export it with version=mammut"
        if not isinstance(model.text, TwoPassTowerWithPads) or not model.pooling.class_token:
            return "version=mammut has only two_pass_with_pads and the pooler mean_all"
        if without_mlp not in (None, decoder.every):
            return "in OpenCLIP the blocks without an MLP are those before a cross block"
        return None

    def sections(self, model: CoCa, version: str) -> dict[str, dict[str, Any]]:
        tower: Any = model.text
        decoder: Any = model.decoder
        if version == "mammut":
            text = {**text_keys(model), **model.tokenizer.open_clip_config}
            text["has_mlp"] = not model.config.text_tower_args
            text["cross_attn_ratio"] = decoder.every
            text["does_full_decoding"] = True
            return {"text_cfg": text}
        keys = {
            "cross_attn_ratio": decoder.every,
            "pool_type": "avg",
            "use_pad_mask": tower.pad_mask,
            "proj_type": "none",
        }
        return {"multimodal_cfg": {**decoder_keys(model), **keys}}

    def translated(self, model: Mapping[str, Any]) -> Mapping[str, Any]:
        text = section_of(model, "text_cfg")
        if "multimodal_cfg" in model or not ("does_full_decoding" in text or "cross_attn_ratio" in text):
            return model
        left_out = ("does_full_decoding", "output_tokens", "pool_type", "use_pad_mask", "proj_type")
        decoder = {key: value for key, value in text.items() if key not in left_out}
        decoder |= {"pool_type": "avg", "use_pad_mask": False, "proj_type": "none"}
        vision = {**section_of(model, "vision_cfg"), "pool_type": "avg_all", "final_ln_after_pool": True}
        others = {key: value for key, value in model.items() if key not in ("text_cfg", "custom_text")}
        return {**others, "vision_cfg": vision, "multimodal_cfg": decoder}

    def read(self, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        if "text.lm_head" in theirs:
            return theirs
        others = {name: tensor for name, tensor in theirs.items() if name != "text.text_projection"}
        return {**others, "text.lm_head": theirs["text.text_projection"]}

    def written(self, theirs: dict[str, Tensor], version: str) -> dict[str, Tensor]:
        if version != "mammut":
            return theirs
        others = {name: tensor for name, tensor in theirs.items() if name != "text.lm_head"}
        return {**others, "text.text_projection": theirs["text.lm_head"]}
