"""CLIP's towers in a CoCa: they compute what OpenCLIP computes; what does not fit is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import resize_pos_embed
from torch import Tensor, nn

from coca_lit.models import CoCa, create_model
from coca_lit.weights.load import load_dual_encoder, save_model
from coca_lit.weights.start import copy_weights, stretch
from helpers.family import check_start_with_another_context

TEXTS = ["a dog", "two cats sit on a very long wooden bench!", "hat!"]
VISION = {"image_size": 32, "patch_size": 8, "width": 128, "layers": 2, "head_width": 64}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
ENCODER = {"patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}


def make_clip(quick_gelu: bool = False, image_size: int = 32) -> Any:
    """OpenCLIP's model with every parameter random."""
    torch.manual_seed(0)
    clip = open_clip.CLIP(48, vision_cfg=VISION | {"image_size": image_size}, text_cfg=TEXT, quick_gelu=quick_gelu)
    for parameter in clip.parameters():
        nn.init.normal_(parameter, std=0.1)
    return clip.eval()


def make_coca(**overrides: Any) -> CoCa:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        **{"image_encoder": "vit_base_patch32_clip_224", "image_encoder_args": ENCODER, "embed_dim": 48},
        **{"pooler_queries": 3, "tokenizer": "clip", "context_length": 76},
        **{"text_width": 64, "text_layers": 2, "text_heads": 1, "decoder_layers": 1},
    }
    return create_model("coca_tiny", **sizes | overrides).eval()


@pytest.fixture(scope="module")
def clip() -> Any:
    return make_clip()


@pytest.fixture(scope="module")
def clip_file(clip: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(clip.state_dict(), path)
    return path


@torch.no_grad()
def image_features(model: CoCa, clip: Any, images: Tensor) -> Tensor:
    """What CLIP makes of our image tokens: its class token through its final norm and projection."""
    norm = clip.visual.ln_post
    return F.layer_norm(model.image_encoder(images)[:, 0], norm.normalized_shape, norm.weight, norm.bias) @ (
        clip.visual.proj
    )


@torch.no_grad()
def text_features(model: CoCa, texts: list[str]) -> Tensor:
    """What our text tower makes of the end token, which is where CLIP reads its features."""
    tokens = model.tokenizer(texts)
    lengths = (tokens != 0).sum(1)
    states, _, _ = model.text(tokens, lengths, contrastive=False, packed=False)
    return model.text.projection(model.text.norm(states[torch.arange(len(texts)), lengths - 1]))


def test_towers_compute_what_clip_does(clip: Any, clip_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_coca()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copy_weights(load_dual_encoder(clip_file), model, clip_file)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(image_features(model, clip, images), clip.encode_image(images), atol=1e-5, rtol=0)
        expected = clip.encode_text(open_clip.get_tokenizer("ViT-B-32")(TEXTS))
    torch.testing.assert_close(text_features(model, TEXTS), expected, atol=1e-5, rtol=0)
    new = ("pooling.", "image_projection.", "text.cls_embedding", "decoder.", "logit_scale")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith(new), name
    said = capsys.readouterr().out
    assert "; random: logit_scale, pooling, image_projection, text.cls_embedding, decoder\n" in said
    assert "stay random" not in said


def test_positions_are_fitted(clip: Any, clip_file: Path) -> None:
    model = make_coca(image_size=64, context_length=20)
    copy_weights(load_dual_encoder(clip_file), model, clip_file)
    larger, state = make_clip(image_size=64), clip.state_dict()
    resize_pos_embed(state, larger)
    larger.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(image_features(model, clip, images), larger.encode_image(images), atol=1e-5, rtol=0)
        expected = clip.encode_text(open_clip.get_tokenizer("ViT-B-32")(TEXTS))
    torch.testing.assert_close(text_features(model, TEXTS), expected, atol=1e-5, rtol=0)


def test_a_longer_context_is_stretched(clip: Any, clip_file: Path) -> None:
    model = make_coca(context_length=247)
    copy_weights(load_dual_encoder(clip_file), model, clip_file)
    assert torch.equal(model.text.position_embedding, stretch(clip.positional_embedding, 248))


def test_stretched_positions_by_hand() -> None:
    """Long-CLIP's table: 24 positions, the first 20 kept, the others four times as close, and three beyond the last."""
    rows = torch.tensor([[float(i**2)] for i in range(24)], dtype=torch.float64)
    quarters = [400, 410.25, 420.5, 430.75, 441, 451.75, 462.5, 473.25, 484, 495.25, 506.5, 517.75]
    beyond = [529, 540.25, 551.5, 562.75]
    expected = [float(i**2) for i in range(20)] + quarters + beyond
    assert stretch(rows, 36)[:, 0].tolist() == expected
    assert stretch(rows, 7)[:, 0].tolist() == [0, 1, 4, 9, 16, 25, 36]


@pytest.mark.slow
def test_a_captioner_starts_with_another_context() -> None:
    """CLS keeps its own row."""
    source = make_coca(context_length=24)
    for length in (40, 12):
        model = make_coca(context_length=length)
        check_start_with_another_context(source, model)
        assert torch.equal(model.text.position_embedding[length], source.text.position_embedding[24])


def test_what_stays_random_is_said(clip_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_coca()
    model.freeze("text")
    copy_weights(load_dual_encoder(clip_file), model, clip_file)
    assert "note: random and frozen: text.cls_embedding\n" in capsys.readouterr().out
    copy_weights(load_dual_encoder(clip_file), make_coca(), clip_file, adapted=["text", "decoder"])
    assert "note: random and frozen: text.cls_embedding, decoder\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"text_width": 128, "text_heads": 2}, "the text tower has 2 heads in the model and 1 in the CLIP"),
        ({"text_width": 128}, r"'text.position_embedding' is \(77, 128\) in the model and \(77, 64\) in the file"),
        ({"text_layers": 1}, "'text.blocks.1.norm_1.weight' is absent in the model and"),
        ({"embed_dim": 24}, r"'text.projection.weight' is \(24, 64\) in the model and \(48, 64\) in the file"),
        ({"image_encoder_args": ENCODER | {"num_heads": 4}}, r"attn\.num_heads is 4 in the model and 2 in the file"),
        ({"image_encoder": "resnet10t", "image_encoder_args": {}}, r"resnet10t"),
        ({"tokenizer": ["a", "b"]}, "vocabulary"),
    ],
)
def test_other_architectures_are_refused(clip_file: Path, overrides: dict[str, Any], message: str) -> None:
    model = make_coca(**overrides)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        copy_weights(load_dual_encoder(clip_file), model, clip_file)
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)


def test_quick_gelu_is_refused(tmp_path: Path) -> None:
    torch.save(make_clip(quick_gelu=True).state_dict(), tmp_path / "clip.pt")
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"quick_gelu": true, "text_cfg": {"heads": 1}}}')
    with pytest.raises(ValueError, match="QuickGELU"):
        copy_weights(load_dual_encoder(tmp_path / "clip.pt"), make_coca(), tmp_path / "clip.pt")


def test_a_clip_of_our_own_keeps_its_features(
    tiny_model: Callable[..., CoCa], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = tiny_model(decoder_layers=0, pooler_queries=1)
    save_model(clip, tmp_path / "clip.safetensors")
    torch.manual_seed(5)
    model = create_model("coca_tiny").eval()
    queries = model.pooling.generative.query[1:].clone()
    copy_weights(load_dual_encoder(tmp_path / "clip.safetensors"), model, tmp_path / "clip.safetensors")
    images, tokens = torch.randn(2, 3, 32, 32), model.tokenizer(["a red circle", "a blue ring"])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), clip.encode_image(images))
        torch.testing.assert_close(model.encode_text(tokens), clip.encode_text(tokens))
    assert torch.equal(model.pooling.generative.query[1:], queries)
    assert "; random: decoder\n" in capsys.readouterr().out


def test_towers_start_a_model_with_tied_embeddings(tiny_model: Callable[..., CoCa]) -> None:
    clip, model = tiny_model(decoder_layers=0, pooler_queries=1), create_model("coca_tiny", tied_embeddings=True)
    copy_weights(clip, model, "file")
    assert torch.equal(model.decoder.vocabulary.weight, clip.text.token_embedding.weight)
    assert model.text.token_embedding.weight is model.decoder.vocabulary.weight
