"""Exported folders load in OpenCLIP strictly and compute there what they compute here; OpenCLIP's own come back bit for
bit.
"""

import json
import math
import re
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.push_to_hf_hub import save_config_for_hf
from open_clip.transform import PreprocessCfg
from PIL import Image
from safetensors.torch import load_file, save_file

from coca_lit.data.transforms import build_transform
from coca_lit.models import CoCa, create_model
from coca_lit.tools.export.open_clip import write_open_clip
from coca_lit.weights.load import load_model
from coca_lit.weights.open_clip import from_open_clip, to_open_clip
from coca_lit.weights.open_clip.config_keys import PREPROCESS_KEYS
from coca_lit.weights.open_clip.image import ClipTransformer
from coca_lit.weights.open_clip.poolers import SinglePooler
from coca_lit.weights.open_clip.text import ClassicText
from helpers.slow import slow

TEXTS = ["a dog", "two cats sit on a very long wooden bench!", "word " * 90]
SMALL = {
    "image_encoder": "vit_base_patch16_clip_224",
    "image_encoder_args": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    **{"image_size": 32, "embed_dim": 32, "pooler_queries": 5, "pooler_heads": 4, "tokenizer": "clip"},
    **{"context_length": 20, "text_width": 32, "text_layers": 2, "text_heads": 4, "decoder_layers": 2},
    "cls_mask": "legacy",
}
SHIFTED = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    torch.manual_seed(1)
    return Image.fromarray(torch.randint(0, 256, (51, 77, 3), dtype=torch.uint8).numpy())


def small(**overrides: Any) -> CoCa:
    torch.manual_seed(0)
    model = create_model("coca_vit_b32", **SMALL | overrides).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        *slow(
            {"cls_mask": "correct"},
            {"decoder_layers": 0, "pooler_queries": 1},
            {"contrastive": "siglip", "decoder_layers": 0, "pooler_queries": 1},
            {"image_encoder_args": {**SMALL["image_encoder_args"], "pretrained_cfg_overlay": SHIFTED, "mlp_ratio": 3}},
            {"interpolation": "bilinear", "resize_mode": "squash"},
        ),
        {"resize_mode": "longest"},
    ],
    ids=[
        *("captioner", "correct mask", "clip", "sigmoid without a decoder"),
        *("normalisation and width of the MLP", "squashed", "letterboxed"),
    ],
)
def test_open_clip_computes_the_same(photo: Image.Image, tmp_path: Path, overrides: dict[str, Any]) -> None:
    ours = small(**overrides)
    write_open_clip(ours, tmp_path, correct_cls_mask=ours.config.cls_mask == "correct")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    theirs.eval()
    theirs.text.correct_cls_mask = ours.config.cls_mask == "correct"
    images = build_transform(**ours.preprocessing)(photo)[None].expand(len(TEXTS), -1, -1, -1)
    their_images = preprocess(photo)[None].expand(len(TEXTS), -1, -1, -1)
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(TEXTS)
    with torch.no_grad():
        out = ours(images, tokens)
        same(out.image_features, theirs.encode_image(their_images, normalize=True))
        same(out.text_features, theirs.encode_text(tokens, normalize=True))
        if ours.decoder is not None:
            expected = theirs(their_images, tokens)
            same(out.logits, expected["logits"][expected["labels"] != 0])
            same(out.logit_scale[0], expected["logit_scale"])
        if ours.logit_bias is not None:
            same(ours.logit_bias[0], theirs.logit_bias)
        theirs.text.correct_cls_mask = not theirs.text.correct_cls_mask
        assert (out.text_features - theirs.encode_text(tokens, normalize=True)).abs().max() > 0.01  # so it matters
    again = load_model(tmp_path / "open_clip_model.safetensors")
    assert again.config.cls_mask == ours.config.cls_mask
    assert again.preprocessing == ours.preprocessing
    with torch.no_grad():
        same(again.encode_image(images), out.image_features)
        same(again.encode_text(tokens), out.text_features)


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_files_that_compute_something_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(model: CoCa, version: str) -> dict[str, torch.Tensor]:
        return {name: x.half().float() for name, x in to_open_clip(model, version).items()}

    def without_text(model: CoCa, version: str) -> dict[str, torch.Tensor]:  # images stay as they are
        return {
            name: x * math.nan if name == "text.ln_final.weight" else x
            for name, x in to_open_clip(model, version).items()
        }

    monkeypatch.setattr("coca_lit.tools.export.open_clip.to_open_clip", without_text)
    with pytest.raises(ValueError, match="differs by nan"):
        write_open_clip(small(), tmp_path)
    monkeypatch.setattr("coca_lit.tools.export.open_clip.to_open_clip", rounded)
    with pytest.raises(ValueError, match="differs by"):
        write_open_clip(small(), tmp_path)


def test_a_model_of_open_clip_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """With numbers of heads that only its config tells."""
    text = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {
        "embed_dim": 32,
        "vision_cfg": {
            **{"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8, "output_tokens": True},
            **{"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2},
        },
        "text_cfg": {**text, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": text,
        "custom_text": True,
    }
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    (first / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.manual_seed(0)
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{first}")
    torch.nn.init.normal_(theirs.text_decoder.text_projection)  # which it leaves as it finds the memory
    save_file(theirs.state_dict(), first / "open_clip_model.safetensors")
    save_config_for_hf(theirs, first / "open_clip_config.json", config)

    ours = load_model(first / "open_clip_model.safetensors")
    assert (ours.config.text_heads, ours.config.pooler_heads) == (2, 2)
    write_open_clip(ours, second)
    again, _, _ = open_clip.create_model_and_transforms(f"local-dir:{second}")
    torch.testing.assert_close(dict(again.state_dict()), dict(theirs.state_dict()), atol=0, rtol=0)
    tokens = open_clip.get_tokenizer(f"local-dir:{second}")(TEXTS)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        for a, b in zip(theirs.eval()(images, tokens).values(), again.eval()(images, tokens).values(), strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)


QUICK = "vit_base_patch32_clip_quickgelu_224"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tokenizer": ["a", "dog"]}, "tokenizer of its own"),
        ({"pooler": "cascade"}, "cascade"),
        ({"image_encoder": "resnet10t", "image_encoder_args": {}}, "resnet10t"),
        ({"image_encoder": QUICK}, QUICK),
        ({"text_width": 64}, "tokens of 32 with a width of 64"),
        ({"cls_mask": "correct"}, "correct_cls_mask=true"),
    ],
)
def test_what_open_clip_cannot_build_is_refused(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        write_open_clip(small(**overrides), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """State dict and config of an export."""
    folder = tmp_path_factory.mktemp("exported")
    write_open_clip(small(), folder)
    return load_file(folder / "open_clip_model.safetensors"), json.loads((folder / "open_clip_config.json").read_text())


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("", {"quick_gelu": True}, "QuickGELU"),
        ("multimodal_cfg", {"heads": 2}, "4 and 2 heads"),
        ("vision_cfg", {"norm_kwargs": {"eps": 1e-6}}, "vision_cfg.norm_kwargs = {'eps': 1e-06}"),
        ("text_cfg", {"tokenizer_kwargs": {"clean": "canonicalize"}}, "text_cfg.tokenizer_kwargs"),
        ("vision_cfg", {"timm_model_name": "resnet10t"}, "vision_cfg.timm_model_name = 'resnet10t'"),
        ("vision_cfg", {"image_size": 64}, "vision_cfg.image_size is 64.*32"),
        ("vision_cfg", {"head_widht": 16}, "vision_cfg.head_widht.* did you mean"),
        ("vision_cfg", {"head_width": "x"}, "head_width.*'x'"),
        ("", {"audio_cfg": {}}, "'audio_cfg'"),
        ("", {"vision_cfg": []}, "vision_cfg.*list"),
        ("preprocess_cfg", {"resize_mode": "crop"}, "resize_mode.*'crop'"),
        ("preprocess_cfg", {"mean": [0.1]}, r"preprocess_cfg.mean.*\[0.1\]"),
        ("preprocess_cfg", {"gamma": 2.2}, "'preprocess_cfg.gamma'"),
    ],
)
def test_keys_that_change_the_computation(
    exported: tuple[dict[str, Any], dict[str, Any]], section: str, change: dict[str, Any], message: str
) -> None:
    state, config = exported
    config = deepcopy(config)
    model = config["model_cfg"]
    part = model if not section else model[section] if section in model else config[section]
    part.update(change)
    with pytest.raises(ValueError, match=message):
        from_open_clip(state, config)


def test_keys_that_are_honoured(exported: tuple[dict[str, Any], dict[str, Any]]) -> None:
    state, config = exported
    config = deepcopy(config)
    config["model_cfg"]["vision_cfg"] |= {"patch_dropout": 0.5, "norm_kwargs": {"eps": 1e-5}, "act_kwargs": None}
    config["model_cfg"]["text_cfg"] |= {"correct_cls_mask": True, "mlp_ratio": 4.0}  # a key of OpenCLIP 4
    config["preprocess_cfg"] |= {"interpolation": "bilinear", "resize_mode": "squash", "std": 0.5, "fill_color": 0}
    with pytest.raises(ValueError, match="two CLS masks"):
        from_open_clip(state, config)
    del config["coca_lit"]
    model = from_open_clip(state, config)
    assert model.config.cls_mask == "correct"
    assert model.preprocessing == {"size": 32, "interpolation": "bilinear", "resize_mode": "squash"}
    assert model.image_encoder.normalise.std.flatten().tolist() == [0.5, 0.5, 0.5]
    flat = from_open_clip(state, config["model_cfg"])  # as the files of OpenCLIP's own sizes
    assert flat.config.text_heads == 4


def test_every_key_of_open_clip_is_known() -> None:
    known = {
        CLIPVisionCfg: ClipTransformer.allowed["vision_cfg"] | SinglePooler.allowed["vision_cfg"],
        CLIPTextCfg: ClassicText.allowed["text_cfg"],
        MultimodalCfg: ClassicText.allowed["multimodal_cfg"],
        PreprocessCfg: PREPROCESS_KEYS,
    }
    for section, allowed in known.items():
        assert {field.name for field in fields(section)} <= allowed.keys()
