"""CLIP against OpenCLIP: the same weights give the same features, in every layout that its files have."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CustomTextCLIP
from torch import Tensor, nn

from coca_lit.models.clip import CLIP
from coca_lit.weights.load import load_dual_encoder, load_model
from coca_lit.weights.open_clip import clip_from_open_clip

TEXTS = ["a dog", "two cats sit on a very long wooden bench!", "hat!", "word " * 90]
VISION = {"image_size": 32, "patch_size": 8, "width": 128, "layers": 2, "head_width": 64}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}


def make(kind: type[nn.Module] = open_clip.CLIP, quick_gelu: bool = False, **vision: Any) -> nn.Module:
    """OpenCLIP's model with every parameter random."""
    torch.manual_seed(0)
    theirs = kind(48, vision_cfg=VISION | vision, text_cfg=TEXT, quick_gelu=quick_gelu).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    return theirs


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(len(TEXTS), 3, 32, 32), open_clip.get_tokenizer("ViT-B-32")(TEXTS)


@torch.no_grad()
def assert_equal_features(theirs: nn.Module, ours: CLIP, batch: tuple[Tensor, Tensor]) -> None:
    images, tokens = batch
    assert torch.equal(ours.tokenizer(TEXTS), tokens)
    for normalize in (True, False):
        for name, argument in (("encode_image", images), ("encode_text", tokens)):
            expected = getattr(theirs, name)(argument, normalize=normalize)
            torch.testing.assert_close(getattr(ours, name)(argument, normalize=normalize), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("kind", [open_clip.CLIP, CustomTextCLIP])
def test_features_are_equal(kind: type[nn.Module], quick_gelu: bool, batch: tuple[Tensor, Tensor]) -> None:
    theirs = make(kind, quick_gelu)
    ours = clip_from_open_clip(theirs.state_dict(), quick_gelu=quick_gelu).eval()
    assert_equal_features(theirs, ours, batch)
    torch.testing.assert_close(ours.logit_scale, theirs.logit_scale)
    wrong = clip_from_open_clip(theirs.state_dict(), quick_gelu=not quick_gelu).eval()
    assert (wrong.encode_image(batch[0]) - ours.encode_image(batch[0])).abs().max() > 1e-4


def test_wider_mlp_layer_scale_and_training_checkpoint(batch: tuple[Tensor, Tensor]) -> None:
    """ViT-M-16-alt has a layer scale."""
    theirs = make(mlp_ratio=4.9231, ls_init_value=0.1)
    state = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    assert_equal_features(theirs, clip_from_open_clip({"epoch": 3, "state_dict": state}).eval(), batch)


def test_heads_and_normalisation_of_the_config(batch: tuple[Tensor, Tensor]) -> None:
    theirs = make(head_width=32)
    config = {"model_cfg": {"vision_cfg": VISION | {"head_width": 32}, "text_cfg": TEXT}}
    config["preprocess_cfg"] = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}
    ours = clip_from_open_clip(theirs.state_dict(), config).eval()
    assert_equal_features(theirs, ours, batch)
    pixels = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(config["preprocess_cfg"][key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(ours.encode_image(pixels), ours.encode_image((pixels / 255 - mean) / std))


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-H-14", "ViT-bigG-14"])
def test_heads_of_the_released_sizes(name: str) -> None:
    """Heads are not in a state dict: they follow from the width, by OpenCLIP's own sizes."""
    config = json.loads((Path(open_clip.__file__).parent / "model_configs" / f"{name}.json").read_text())
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 1
    with torch.device("meta"):
        theirs = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
        ours = clip_from_open_clip(theirs.state_dict())
    assert ours.image_encoder.trunk.blocks[0].attn.num_heads == theirs.visual.transformer.resblocks[0].attn.num_heads
    assert ours.blocks[0].attention.heads == theirs.transformer.resblocks[0].attn.num_heads
    assert ours.image_size == config["vision_cfg"]["image_size"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"visual.layer1.0.conv1.weight": 1}, "with a vision transformer .*'visual.conv1.weight'"),  # a ResNet
        ({"visual.trunk.stem.weight": 1}, "with a vision transformer .*'visual.conv1.weight'"),  # of timm
        ({"visual.conv1.weight": 1}, "'visual.proj'"),
    ],
)
def test_other_architectures_are_refused(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip_from_open_clip({"logit_scale": torch.zeros(())} | dict.fromkeys(state, torch.zeros(2, 2)))
    good = make().state_dict()
    with pytest.raises(ValueError, match="extra"):
        clip_from_open_clip(good | {"extra": torch.zeros(1)})


def test_the_activation_is_said_by_the_user_or_by_the_file_beside(
    tmp_path: Path, batch: tuple[Tensor, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    theirs = make(quick_gelu=True)
    path = tmp_path / "open_clip_pytorch_model.bin"
    torch.save(theirs.state_dict(), path)
    assert_equal_features(theirs, load_dual_encoder(path, quick_gelu=True), batch)
    assert not caplog.records
    load_dual_encoder(path)
    assert "quick_gelu=true" in caplog.text
    caplog.clear()
    described = {"quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": described}))
    assert_equal_features(theirs, load_dual_encoder(path), batch)
    assert not caplog.records
    with pytest.raises(ValueError, match="CLIP without a captioner"):
        load_model(path)
