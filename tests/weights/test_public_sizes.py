"""The thirty sizes of LAION's scaling study against its configs and a second implementation; heads of its CLIPs.

The configs are model configs of LAION-AI/open_clip_mammut at commit ed2d1f6 (MIT).
"""

import json
from dataclasses import asdict
from typing import Any

import open_clip
import pytest
import torch

from coca_lit.models import create_model
from coca_lit.weights.open_clip import clip_from_open_clip, from_open_clip, to_open_clip
from helpers import oracle
from helpers.coca2 import TEXTS
from helpers.shared_data import SHARED
from helpers.study import PROFILE

CONFIGS = SHARED / "public_models"
CLIPS = sorted(path.stem for path in CONFIGS.glob("ViT-*.json"))
# Whose numbers are computed: each size of patches, cross blocks with and without an MLP.
COMPUTED = ("coca_ViT-S-14", "mammut_ViT-S-16", "mammut_ViT-L-32")
COMPUTED_CLIPS = ("ViT-S-32", "ViT-M-16-alt", "ViT-H-14")  # and LayerScale
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CONFIGS.is_dir(), reason=f"needs {CONFIGS}")]


def config_of(name: str, layers: int) -> dict[str, Any]:
    """LAION's config of a size with fewer layers, and images of four patches."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    config["vision_cfg"] |= {"layers": 2, "image_size": 2 * config["vision_cfg"]["patch_size"]}
    for part in ("text_cfg", "multimodal_cfg"):
        if part in config:
            config[part]["layers"] = layers
    return config


def sizes_of(name: str, config: dict[str, Any]) -> dict[str, Any]:
    few = {"image_size": config["vision_cfg"]["image_size"], "text_layers": 3, "decoder_layers": 3}
    mask = {"cls_mask": "legacy"} if name.startswith("coca") else {}  # as OpenCLIP trains it
    return {"image_encoder_args": {"depth": 2}, **few, **mask}


def release_of(name: str) -> str:
    return "mammut" if name.startswith("mammut") else "4"


@pytest.mark.parametrize("name", PROFILE)
def test_a_preset_is_what_its_config_asks_for(name: str) -> None:
    config = config_of(name, layers=3)
    with torch.device("meta"):
        preset = create_model(name, **sizes_of(name, config))
        loaded = from_open_clip(to_open_clip(preset, release_of(name)), config)  # to which its tensors fit
    asked, found = (
        {key: value for key, value in asdict(model.config).items() if not key.startswith("image_encoder")}
        for model in (preset, loaded)
    )
    assert asked == found  # B/32 and L/14 have image encoders with a name of their own
    vision = config["vision_cfg"]
    heads = vision["width"] // vision.get("head_width", 64)
    for model in (preset, loaded):
        assert {block.attn.num_heads for block in model.image_encoder.trunk.blocks} == {heads}
    assert preset.config.text_heads == config["text_cfg"]["heads"]


@pytest.mark.parametrize("name", COMPUTED)
@torch.no_grad()
def test_sizes_equal_a_second_implementation(name: str) -> None:
    config = config_of(name, layers=3)
    vision, text = config["vision_cfg"], config["text_cfg"]
    with torch.device("meta"):
        shapes = to_open_clip(create_model(name, **sizes_of(name, config)), release_of(name))
    state = oracle.random_state({key: tuple(tensor.shape) for key, tensor in shapes.items()})
    state = {key: tensor * 0.3 if tensor.ndim > 1 else tensor for key, tensor in state.items()}
    model = from_open_clip(state, config).eval()
    images = torch.randn(2, 3, vision["image_size"], vision["image_size"], generator=torch.Generator().manual_seed(1))
    tokens = model.tokenizer(TEXTS[:2])
    out, logits = model(images, tokens), []
    s = {key: tensor.double() for key, tensor in state.items()}
    heads = vision["width"] // vision.get("head_width", 64)
    for i, (image, ids) in enumerate(zip(images.double(), tokens.tolist(), strict=True)):
        seen, real = oracle.vision_tokens(s, image, heads), ids[: ids.index(49407)]
        if name.startswith("mammut"):
            feature, context = oracle.mammut_image(s, seen, class_token=True)
            found = oracle.mammut_text(s, ids, text["heads"])
            logits.append(oracle.mammut_logits(s, real, context, text["heads"], text["cross_attn_ratio"]))
        else:
            pooled = oracle.pool_queries(s, "visual.attn_pool", seen, vision["attn_pooler_heads"])
            pooled = oracle.layer_norm(s, "visual.ln_post", pooled)
            feature, context = pooled[0] @ s["visual.proj"], pooled[1:]
            found, states = oracle.classic_text(s, ids, text["heads"], correct=False)
            logits.append(oracle.classic_decoder(s, states[: len(real)], context, config["multimodal_cfg"]["heads"]))
        torch.testing.assert_close(out.image_features[i].double(), oracle.unit(feature), atol=5e-5, rtol=0)
        torch.testing.assert_close(out.text_features[i].double(), oracle.unit(found), atol=5e-5, rtol=0)
    torch.testing.assert_close(out.logits.double(), torch.cat(logits), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", CLIPS)
def test_clips_without_a_config_have_their_heads(name: str) -> None:
    """By OpenCLIP's rule in all of the study's CLIPs, -alt and -text-plus included."""
    config = config_of(name, layers=1)
    vision, text = config["vision_cfg"], config["text_cfg"]
    with torch.device("meta"):
        theirs = open_clip.CLIP(config["embed_dim"], vision_cfg=vision, text_cfg=text)
        ours = clip_from_open_clip(theirs.state_dict())
    assert ours.image_encoder.trunk.blocks[0].attn.num_heads == vision["width"] // vision.get("head_width", 64)
    assert ours.blocks[0].attention.heads == text["heads"]


@pytest.mark.parametrize("name", COMPUTED_CLIPS)
@torch.no_grad()
def test_clips_without_a_config_compute_the_same(name: str) -> None:
    config = config_of(name, layers=1)
    torch.manual_seed(0)
    theirs = open_clip.CLIP(config["embed_dim"], vision_cfg=config["vision_cfg"], text_cfg=config["text_cfg"]).eval()
    ours = clip_from_open_clip(theirs.state_dict()).eval()
    side = config["vision_cfg"]["image_size"]
    images, tokens = torch.randn(2, 3, side, side), ours.tokenizer(TEXTS[:2])
    same = torch.testing.assert_close
    same(ours.encode_image(images), theirs.encode_image(images, normalize=True), atol=1e-5, rtol=1e-4)
    same(ours.encode_text(tokens), theirs.encode_text(tokens, normalize=True), atol=1e-5, rtol=1e-4)
