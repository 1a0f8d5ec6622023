"""timm's NaFlexVit, and the poolers used with it, in OpenCLIP's files."""

import math
from collections.abc import Mapping
from typing import Any

from coca_lit.models.coca import CoCa
from coca_lit.models.image import CLIP_NORMALISATION
from coca_lit.models.registry import NORMALISATION
from coca_lit.projects.naflex.encoder import DEFAULTS, TIMM_NAME, NaFlexEncoder
from coca_lit.projects.naflex.poolers import MaskedCascadePooling, MaskedParallelPooling
from coca_lit.weights.open_clip.config_keys import FILE, VISION_KEYS, Allowed, OpenClipConfig, count
from coca_lit.weights.open_clip.parts import ImagePart, Renaming, Tensors, depth
from coca_lit.weights.open_clip.poolers import QUERY_POOLER, TwoPoolers

_ALLOWED: dict[str, Allowed] = {
    "vision_cfg": {
        **VISION_KEYS,
        "timm_model_name": (TIMM_NAME,),
        "timm_model_kwargs": None,  # read here
        "ls_init_value": None,  # of OpenCLIP's own transformer
    }
}


class NaFlexTransformer(ImagePart):
    kinds = (NaFlexEncoder,)
    since = "4"
    names = (Renaming("image_encoder.trunk.", "visual.trunk."),)
    allowed = _ALLOWED
    models = ("coca2-moderntext-naflex_ViT-B-32",)

    def arguments(self, theirs: Tensors) -> dict[str, Any]:
        """The size of images is not in its tensors: without a config they fill the learned grid."""
        width, pixels = theirs["visual.trunk.embeds.proj.weight"].shape
        _, height, columns, _ = theirs["visual.trunk.embeds.pos_embed"].shape
        patch_size = math.isqrt(pixels // 3)
        registers = theirs.get("visual.trunk.embeds.reg_token")
        sizes = {
            "embed_dim": width,
            "depth": depth(theirs, "visual.trunk.blocks"),
            "mlp_ratio": len(theirs["visual.trunk.blocks.0.mlp.fc1.weight"]) / width,
            "reg_tokens": 0 if registers is None else registers.shape[1],
        }
        return {
            "image_encoder": "naflex",
            "image_encoder_args": {
                "patch_size": patch_size,
                "pre_norm": "visual.trunk.norm_pre.weight" in theirs,
                "pos_embed_grid_size": [height, columns],
                **{name: value for name, value in sizes.items() if value != DEFAULTS[name]},
            },
            "image_size": height * patch_size,
        }

    def without_config(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """OpenCLIP has one model with this encoder."""
        found: dict[str, Any] = {"context_length": 128}
        tower = arguments.get("text_tower_args") or {}
        if tower.get("pool") == "eos":
            found["text_tower_args"] = {**tower, "pool": "mean"}
        return found

    def configured(self, config: OpenClipConfig, arguments: Mapping[str, Any]) -> dict[str, Any]:
        encoder = dict(arguments["image_encoder_args"])
        shown = {**DEFAULTS, "pre_norm": False, "pos_embed_grid_size": [16, 16], **encoder}
        given = config.vision.get("timm_model_kwargs") or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"{FILE}: vision_cfg.timm_model_kwargs must be a dictionary, not a {type(given).__name__}")
        heads = count(given, "num_heads", DEFAULTS["num_heads"])
        for key, value in given.items():
            if key not in shown:
                raise ValueError(f"{FILE} asks for vision_cfg.timm_model_kwargs.{key}, which coca_lit does not know")
            if key != "num_heads" and value != shown[key]:
                raise ValueError(
                    f"{FILE} belongs to other weights: its vision_cfg.timm_model_kwargs.{key} is {value!r}, and the"
                    f" tensors show {shown[key]!r}"
                )
        if heads != DEFAULTS["num_heads"]:
            encoder["num_heads"] = heads
        image_size = count(config.vision, "image_size", 224)
        budget = (image_size // encoder["patch_size"]) ** 2
        if config.vision.get("image_seq_len") is not None:
            asked = count(config.vision, "image_seq_len", budget)
            if asked != budget:
                encoder["max_patches"] = asked
        if config.normalisation != CLIP_NORMALISATION:
            encoder[NORMALISATION] = config.normalisation
        return {"image_encoder_args": encoder, "image_size": image_size}

    def keys(self, encoder: NaFlexEncoder) -> dict[str, Any]:
        trunk: Any = encoder.trunk
        block = trunk.blocks[0]
        sizes = {
            "patch_size": encoder.input_kind.patch_size,
            "embed_dim": encoder.width,
            "depth": len(trunk.blocks),
            "num_heads": block.attn.num_heads,
            "mlp_ratio": block.mlp.fc1.out_features / encoder.width,
            "reg_tokens": trunk.num_reg_tokens,
        }
        arguments = {key: value for key, value in sizes.items() if key == "patch_size" or value != DEFAULTS[key]}
        arguments["pre_norm"] = hasattr(trunk.norm_pre, "weight")
        arguments["pos_embed_grid_size"] = list(trunk.embeds.pos_embed.shape[1:3])
        return {
            "timm_model_name": TIMM_NAME,
            "timm_model_kwargs": arguments,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": encoder.image_size,
            "image_seq_len": encoder.input_kind.max_patches,
        }

    def obstacle(self, model: CoCa, version: str) -> str | None:
        known = {*DEFAULTS, "pre_norm", "pos_embed_grid_size", "max_patches", NORMALISATION}
        arguments = model.config.image_encoder_args or {}
        others = sorted(name for name in arguments if name not in known and "drop" not in name)
        if others:
            return f"OpenCLIP's config does not say {', '.join(others)} of an image encoder for any shape"
        return None


class MaskedPoolers(TwoPoolers):
    """They are siblings of the image encoder, not parts of it."""

    kinds = (MaskedParallelPooling, MaskedCascadePooling)
    names = (
        Renaming("pooling.norm.", "pool_norm."),
        Renaming("pooling.generative.", "attn_pool.", QUERY_POOLER),
        Renaming("pooling.contrastive.", "attn_pool_contrastive.", QUERY_POOLER),
    )
    models = ()
    ours = "masked"
    theirs = ""
