"""The 15 CoCas of LAION's scaling study, as its profile publishes them.

Source: `model_profile.csv` of LAION-AI/scaling-laws-for-comparison at commit 5343917.
"""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coca_lit.models import CoCa, create_model
from coca_lit.tools.plan.trace import trace
from coca_lit.weights.open_clip import from_open_clip, to_open_clip
from helpers import oracle
from helpers.shared_data import SHARED


class Profile(NamedTuple):
    parameters: float  # millions
    image: float
    text: float
    gflops: float  # of a pair of image and text, see `tests/tools/plan/test_study_flops.py`


PROFILE = {
    "coca_ViT-B-14": Profile(251.81, 87.42, 63.43, 73.57),
    "coca_ViT-B-16": Profile(420.68, 88.95, 123.65, 97.2),
    "coca_ViT-B-32": Profile(253.56, 89.16, 63.43, 38.08),
    "coca_ViT-H-14": Profile(1646.1, 636.8, 354.03, 535.51),
    "coca_ViT-H-16": Profile(1646.25, 636.96, 354.03, 459.7),
    "coca_ViT-H-32": Profile(1649.02, 639.72, 354.03, 273.96),
    "coca_ViT-L-14": Profile(638.45, 306.72, 123.65, 219.38),
    "coca_ViT-L-16": Profile(638.57, 306.85, 123.65, 182.95),
    "coca_ViT-L-32": Profile(640.78, 309.06, 123.65, 93.7),
    "coca_ViT-M-14": Profile(204.11, 39.71, 63.43, 49.11),
    "coca_ViT-M-16": Profile(204.17, 39.77, 63.43, 44.51),
    "coca_ViT-M-32": Profile(205.27, 40.88, 63.43, 33.26),
    "coca_ViT-S-14": Profile(124.47, 22.46, 40.44, 28.36),
    "coca_ViT-S-16": Profile(124.52, 22.5, 40.44, 25.78),
    "coca_ViT-S-32": Profile(125.35, 23.33, 40.44, 19.45),
}
SMALL = "coca_ViT-S-32"
# Model configs of LAION-AI/open_clip_mammut at commit ed2d1f6 (MIT).
CONFIGS = SHARED / "public_models"


def sizes_among(names: Iterable[str]) -> list[str]:
    """All widths, and of one all sizes of patches, which change their number alone. Texts of B/16 are wider."""
    return [name for name in names if name.endswith("-32") or "-S-" in name or "-B-16" in name]


SIZES = sizes_among(PROFILE)


def millions(model: CoCa) -> tuple[float, float, float]:
    """Parameters as in the profile: all, of the image tower with its pooler, of the text tower."""
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    image = sum(parts[name] for name in ("image_encoder", "pooling", "image_projection"))
    whole = sum(p.numel() for p in model.parameters())
    return whole / 1e6, image / 1e6, parts["text"] / 1e6


def flops_by_part(net: CoCa, tokens: int) -> dict[str, float]:
    """GFLOP of a pair of an image and a text of this many tokens, and of one token's vocabulary.

    Args:
        net: without weights.
    """
    batch = 2
    found = trace(net, {"contrastive": 1.0, "caption": 2.0}, tokens, None, batch).forward
    parts = {part: flops / batch / 1e9 for part, flops in found.items() if "vocabulary" not in part}
    parts["vocabulary, a token"] = 2 * net.config.text_width * net.tokenizer.vocab_size / 1e9
    return parts


def attention_flops(net: CoCa, pooled: int, read: int, crossed: int, context: int) -> dict[str, float]:
    """GFLOP of the two products of attention in each part, which the study does not count.

    Args:
        pooled: queries of the pooler; 0 without one.
        read: tokens that the text tower reads.
        crossed: cross blocks of the decoder.
        context: tokens of the image that each of them attends to.
    """
    sizes, trunk = net.config, net.image_encoder.trunk
    patches = trunk.pos_embed.shape[1]
    rows = sizes.context_length - 1  # the last token predicts nothing
    width, layers = sizes.text_width, sizes.text_layers
    attention = {
        "image encoder": 4 * patches**2 * net.image_encoder.width * len(trunk.blocks),
        "pooling": 4 * pooled * patches * sizes.embed_dim,
        "text tower": 4 * read**2 * width * layers,
        "decoder": 4 * rows**2 * width * layers + 4 * rows * context * width * crossed,
    }
    return {part: flops / 1e9 for part, flops in attention.items()}


def config_of(name: str, layers: int) -> dict[str, Any]:
    """LAION's config of a size with fewer layers, and images of four patches."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    config["vision_cfg"] |= {"layers": 2, "image_size": 2 * config["vision_cfg"]["patch_size"]}
    for part in ("text_cfg", "multimodal_cfg"):
        if part in config:
            config[part]["layers"] = layers
    return config


def small_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a preset that make it as small as the config of `config_of` with three layers."""
    image_size = config["vision_cfg"]["image_size"]
    return {"image_encoder_args": {"depth": 2}, "image_size": image_size, "text_layers": 3, "decoder_layers": 3}


def check_preset_against_its_config(name: str, version: str, **overrides: Any) -> None:
    """A preset is what LAION's config asks for."""
    config = config_of(name, layers=3)
    with torch.device("meta"):
        preset = create_model(name, **small_sizes(config), **overrides)
        loaded = from_open_clip(to_open_clip(preset, version), config)  # to which its tensors fit
    asked, found = (
        {key: value for key, value in model.config.stored().items() if not key.startswith("image_encoder")}
        for model in (preset, loaded)
    )
    assert asked == found  # B/32 and L/14 have image encoders with a name of their own
    vision = config["vision_cfg"]
    heads = vision["width"] // vision.get("head_width", 64)
    for model in (preset, loaded):
        assert {block.attn.num_heads for block in model.image_encoder.trunk.blocks} == {heads}
    assert preset.config.text_heads == config["text_cfg"]["heads"]


def random_weights(name: str, config: dict[str, Any], version: str, **overrides: Any) -> dict[str, Tensor]:
    """Weights of a file of the size of `config`, all of them random."""
    with torch.device("meta"):
        shapes = to_open_clip(create_model(name, **small_sizes(config), **overrides), version)
    state = oracle.random_state({key: tuple(tensor.shape) for key, tensor in shapes.items()})
    return {key: tensor * 0.3 if tensor.ndim > 1 else tensor for key, tensor in state.items()}
