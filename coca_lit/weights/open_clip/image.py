"""CLIP's vision transformers in OpenCLIP's files."""

import math
from collections.abc import Mapping
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from coca_lit.models.coca import CoCa
from coca_lit.models.image import CLIP_NORMALISATION, ImageEncoder
from coca_lit.models.registry import NORMALISATION
from coca_lit.weights.open_clip.config_keys import VISION_KEYS, OpenClipConfig, count
from coca_lit.weights.open_clip.parts import ImagePart, Renaming, Tensors, depth

HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104, 1792: 112}  # by width; of OpenCLIP's sizes from ViT-H on, 64 in the others
ALLOWED = {"vision_cfg": VISION_KEYS}
_BLOCK = {
    "ls1": "ls_1",
    "ls2": "ls_2",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_BLOCK_PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


class ClipTransformer(ImagePart):
    kinds = (ImageEncoder,)
    names = (
        Renaming("image_encoder.trunk.blocks.", "visual.transformer.resblocks.", _BLOCK),
        Renaming("image_encoder.trunk.patch_embed.proj.", "visual.conv1."),
        Renaming("image_encoder.trunk.norm_pre.", "visual.ln_pre."),
        Renaming("image_encoder.trunk.cls_token", "visual.class_embedding"),
        Renaming("image_encoder.trunk.pos_embed", "visual.positional_embedding"),
        Renaming("image_encoder.trunk.norm.", "visual.ln_post."),  # of a CLIP
    )
    flat = ("visual.class_embedding", "visual.positional_embedding")
    allowed = ALLOWED

    def arguments(self, theirs: Tensors) -> dict[str, Any]:
        width, _, patch_size, _ = theirs["visual.conv1.weight"].shape
        mlp_width = len(theirs["visual.transformer.resblocks.0.mlp.c_fc.weight"])
        positions = len(theirs["visual.positional_embedding"]) - 1
        encoder: dict[str, Any] = {
            "patch_size": patch_size,
            "embed_dim": width,
            "depth": depth(theirs, "visual.transformer.resblocks"),
            "num_heads": max(width // HEAD_WIDTH.get(width, 64), 1),
        }
        if mlp_width != 4 * width:
            encoder["mlp_ratio"] = mlp_width / width
        if "visual.transformer.resblocks.0.ls_1.gamma" in theirs:
            encoder["init_values"] = 1e-4
        return {
            "image_encoder": "vit_base_patch32_clip_224",
            "image_encoder_args": encoder,
            "image_size": math.isqrt(positions) * patch_size,
        }

    def shown(self, arguments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        encoder = arguments["image_encoder_args"]
        return {
            "vision_cfg": {
                "image_size": arguments["image_size"],
                "patch_size": encoder["patch_size"],
                "width": encoder["embed_dim"],
                "layers": encoder["depth"],
            }
        }

    def configured(self, config: OpenClipConfig, arguments: Mapping[str, Any]) -> dict[str, Any]:
        encoder = dict(arguments["image_encoder_args"])
        head_width = count(config.vision, "head_width", 64)
        encoder["num_heads"] = encoder["embed_dim"] // head_width
        if not encoder["num_heads"]:
            raise ValueError(
                f"the config asks for heads of {head_width}, but the image tower is {encoder['embed_dim']} wide"
            )
        if config.normalisation != CLIP_NORMALISATION:
            encoder[NORMALISATION] = config.normalisation
        return {"image_encoder_args": encoder}

    def keys(self, encoder: ImageEncoder) -> dict[str, Any]:
        trunk: Any = encoder.trunk
        width = trunk.embed_dim
        heads = trunk.blocks[0].attn.num_heads
        return {
            "image_size": encoder.image_size,
            "layers": len(trunk.blocks),
            "width": width,
            "head_width": width // heads,
            "mlp_ratio": trunk.blocks[0].mlp.fc1.out_features / width,
            "patch_size": trunk.patch_embed.patch_size[0],
        }

    def obstacle(self, model: CoCa, version: str) -> str | None:
        if _is_clip_transformer(model.image_encoder.trunk):
            return None
        return (
            f"its image encoder is {model.config.image_encoder}, and OpenCLIP's CoCa only has CLIP's vision transformer"
            " (vit_*_clip_*, without QuickGELU and without parts that CLIP lacks)"
        )


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
