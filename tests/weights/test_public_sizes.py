"""The sizes of CoCa in LAION's scaling study against its configs and a second implementation; heads of its CLIPs."""

import open_clip
import pytest
import torch

from coca_lit.weights.open_clip import clip_from_open_clip, from_open_clip
from helpers import oracle
from helpers.open_clip_4 import TEXTS
from helpers.study import CONFIGS, PROFILE, check_preset_against_its_config, config_of, random_weights

CLIPS = sorted(path.stem for path in CONFIGS.glob("ViT-*.json"))
COMPUTED = "coca_ViT-S-14"  # whose numbers are computed
COMPUTED_CLIPS = ("ViT-S-32", "ViT-M-16-alt", "ViT-H-14")  # and LayerScale
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CONFIGS.is_dir(), reason=f"needs {CONFIGS}")]


LEGACY = {"cls_mask": "legacy"}  # as OpenCLIP trains it


@pytest.mark.parametrize("name", PROFILE)
def test_a_preset_is_what_its_config_asks_for(name: str) -> None:
    check_preset_against_its_config(name, "4", **LEGACY)


@torch.no_grad()
def test_sizes_equal_a_second_implementation() -> None:
    config = config_of(COMPUTED, layers=3)
    vision, text = config["vision_cfg"], config["text_cfg"]
    state = random_weights(COMPUTED, config, "4", **LEGACY)
    model = from_open_clip(state, config).eval()
    images = torch.randn(2, 3, vision["image_size"], vision["image_size"], generator=torch.Generator().manual_seed(1))
    tokens = model.tokenizer(TEXTS[:2])
    out, logits = model(images, tokens), []
    s = {key: tensor.double() for key, tensor in state.items()}
    heads = vision["width"] // vision.get("head_width", 64)
    for i, (image, ids) in enumerate(zip(images.double(), tokens.tolist(), strict=True)):
        seen, real = oracle.vision_tokens(s, image, heads), ids[: ids.index(49407)]
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
