"""An image encoder in timm's registry: any model that is registered there can be named in `model.net.image_encoder`."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

default_cfgs = generate_default_cfgs(  # where timm looks for them
    {"my_tiny_vit": {"fixed_input_size": True, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}}
)


@register_model
def my_tiny_vit(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Two blocks on patches of 8 × 8 pixels."""
    sizes = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return build_model_with_cfg(VisionTransformer, "my_tiny_vit", pretrained, **sizes, **options)
