"""Parity with OpenCLIP: the same weights give the same features, logits, losses and gradients, and travel both ways."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.coca_model import CoCa as OpenClipCoCa
from open_clip.loss import CoCaLoss
from open_clip.model import resize_pos_embed
from torch import Tensor

from coca_lit.losses import caption_loss, contrastive_loss
from coca_lit.models import CoCa, create_model
from coca_lit.weights.load import load_dual_encoder, load_model
from coca_lit.weights.open_clip import from_open_clip, to_open_clip
from coca_lit.weights.start import copy_weights
from helpers.beam_oracle import TEXT as DECODER
from helpers.beam_oracle import VISION
from helpers.slow import slow

TEXTS = ["a dog", "two cats sit on a very long wooden bench!", "hat", "word " * 90]
HEADS = {"image_encoder_args": {"patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 1}}
TEXT = DECODER | {"embed_cls": True, "output_tokens": True}


def make_pair(embed_dim: int = 64, width: int = 96, context: int = 76) -> tuple[OpenClipCoCa, CoCa]:
    """OpenCLIP's CoCa with every parameter random (it leaves some at zero), and ours with the same weights."""
    torch.manual_seed(0)
    vision, length = VISION | {"width": width, "head_width": width}, {"context_length": context}
    theirs = OpenClipCoCa(embed_dim, vision_cfg=vision, text_cfg=TEXT | length, multimodal_cfg=DECODER | length).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    torch.nn.init.constant_(theirs.logit_scale, 2.0)
    arguments = {"image_encoder_args": HEADS["image_encoder_args"] | {"embed_dim": width}, "text_heads": 4}
    return theirs, from_open_clip(theirs.state_dict(), **arguments).eval()


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(len(TEXTS), 3, 32, 32), open_clip.get_tokenizer("coca_ViT-B-32")(TEXTS)


@pytest.mark.parametrize("context", [76, *slow(77, 256)])
def test_features_and_logits_are_equal(batch: tuple[Tensor, Tensor], context: int) -> None:
    theirs, ours = make_pair(context=context)
    images, tokens = batch[0], open_clip.SimpleTokenizer(context_length=context)([*TEXTS[:3], "word " * 300])
    assert ours.config.context_length == context
    expected = theirs(images, tokens)
    out = ours(images, tokens)
    torch.testing.assert_close(out.image_features, expected["image_features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.text_features, expected["text_features"], atol=1e-5, rtol=0)
    real = expected["labels"] != 0
    torch.testing.assert_close(out.logits, expected["logits"][real], atol=1e-5, rtol=0)
    assert torch.equal(out.labels, expected["labels"][real])
    torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.encode_text(tokens), theirs.encode_text(tokens), atol=1e-5, rtol=0)


def test_another_image_size_interpolates_as_open_clip_does(
    batch: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours = make_pair()
    state, vision = theirs.state_dict(), VISION | {"image_size": 48}
    larger = OpenClipCoCa(64, vision_cfg=vision, text_cfg=TEXT, multimodal_cfg=DECODER).eval()
    resize_pos_embed(state, larger)
    larger.load_state_dict(state)
    started = from_open_clip(larger.state_dict(), **(HEADS | {"text_heads": 4})).eval()
    images, tokens = torch.randn(len(TEXTS), 3, 48, 48), batch[1]
    with torch.no_grad():
        started.image_encoder.trunk.pos_embed.zero_()
        copy_weights(ours, started, "ours")
        assert "ours was trained on images of 32 px" in capsys.readouterr().out
        expected = larger(images, tokens)
    assert (ours.image_size, ours.config.image_size, ours.preprocessing["size"]) == (48, 48, 48)
    for model in (ours, started, CoCa(ours.config).eval()):
        model.load_state_dict(started.state_dict())
        out = model(images, tokens)
        torch.testing.assert_close(out.image_features, expected["image_features"], atol=1e-5, rtol=0)
        torch.testing.assert_close(out.logits, expected["logits"][expected["labels"] != 0], atol=1e-5, rtol=0)


def test_losses_and_gradients_are_equal(batch: tuple[Tensor, Tensor]) -> None:
    """In fp64: with random weights all features are nearly alike, and their gradients small differences."""
    theirs, ours = (model.double() for model in make_pair())
    images, tokens = batch[0].double(), batch[1]
    expected = CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=1.0)(**theirs(images, tokens), output_dict=True)
    out = ours(images, tokens)
    contrastive = contrastive_loss(out.image_features, out.text_features, out.logit_scale)
    caption = caption_loss(out.hidden, out.vocabulary, out.labels)
    torch.testing.assert_close(contrastive, expected["contrastive_loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(caption, expected["caption_loss"], rtol=1e-6, atol=0)

    (expected["contrastive_loss"] + 2 * expected["caption_loss"]).backward()
    (contrastive + 2 * caption).backward()
    as_if_weights = {name: parameter.grad for name, parameter in ours.named_parameters()}
    ours.load_state_dict(as_if_weights)  # so that the converter maps gradients
    for name, gradient in to_open_clip(ours).items():
        reference = dict(theirs.named_parameters())[name].grad
        assert (gradient - reference).norm() <= 1e-6 * reference.norm() + 1e-12, name


def test_the_bias_of_a_sigmoid_loss_goes_both_ways() -> None:
    theirs, plain = make_pair()
    assert plain.logit_bias is None
    state = theirs.state_dict() | {"logit_bias": torch.tensor(-7.5)}
    ours = from_open_clip(state, image_encoder_args=HEADS["image_encoder_args"], text_heads=4)
    assert ours.config.contrastive == "siglip"
    assert ours.logit_bias.tolist() == [-7.5]
    assert to_open_clip(ours)["logit_bias"].item() == -7.5


@pytest.mark.parametrize("width", [64, 96], ids=["packed-pooler", "separate-pooler"])
def test_round_trip_is_exact(width: int) -> None:
    theirs, ours = make_pair(width=width)
    state = to_open_clip(ours)
    theirs.load_state_dict(state, strict=True)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(
    ("name", "preset", "parts"),
    [
        ("coca_ViT-B-32", "coca_vit_b32", (89_164_032, 63_428_608, 100_967_424, 253_560_065)),
        ("coca_ViT-L-14", "coca_vit_l14", (306_724_864, 123_651_072, 208_074_240, 638_450_177)),
    ],
)
def test_released_sizes_have_the_same_tensors(name: str, preset: str, parts: tuple[int, ...]) -> None:
    config = json.loads((Path(open_clip.__file__).parent / "model_configs" / f"{name}.json").read_text())
    with torch.device("meta"):
        theirs = OpenClipCoCa(config["embed_dim"], config["multimodal_cfg"], config["text_cfg"], config["vision_cfg"])
        ours = create_model(preset)
    image = count(ours.image_encoder, ours.pooling, ours.image_projection)
    assert (image, count(ours.text), count(ours.decoder), count(ours)) == parts
    shapes = {n: t.shape for n, t in to_open_clip(ours).items()}
    assert shapes == {n: t.shape for n, t in theirs.state_dict().items()}


def count(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_checkpoints_of_training_runs_load(prefix: str) -> None:
    """Of several processes, of a compiled model, of both in either order."""
    theirs, _ = make_pair()
    state = {f"{prefix}{k}": v for k, v in theirs.state_dict().items()}
    state[f"{prefix}text.attn_mask"] = torch.zeros(76, 76)  # stored by some old versions
    ours = from_open_clip(
        {"epoch": 3, "state_dict": state}, image_encoder_args=HEADS["image_encoder_args"], text_heads=4
    )
    assert torch.equal(to_open_clip(ours)["visual.proj"], theirs.visual.proj)


def test_other_checkpoints_are_refused() -> None:
    with pytest.raises(ValueError, match="not an OpenCLIP CoCa"):
        from_open_clip({"visual.proj": torch.zeros(2, 2)})
    theirs, _ = make_pair()
    with pytest.raises(ValueError, match="'extra'"):
        from_open_clip(theirs.state_dict() | {"extra": torch.zeros(1)}, text_heads=4)
    turned = theirs.state_dict()["text_decoder.text_projection"].T
    with pytest.raises(ValueError, match=r"'text_decoder\.text_projection' has the shape \(64, 49408\)"):
        from_open_clip(theirs.state_dict() | {"text_decoder.text_projection": turned}, text_heads=4)


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        ({}, {"vision_cfg": {"head_width": 20}}),
        ({"visual.proj": torch.tensor(1.0)}, {}),
        ({"text.positional_embedding": torch.tensor(1.0)}, {}),
    ],
)
def test_files_that_no_model_fits_are_one_sentence(
    tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any]
) -> None:
    theirs, _ = make_pair(width=64)
    torch.save(theirs.state_dict() | tensors, tmp_path / "x.pt")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(ValueError, match=r"x\.pt' is damaged, or no model that coca_lit can build: \w"):
        load_model(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "part",
    [
        *({"final_norm": True}, {"init_values": 0.1}, {"qk_norm": True}, {"reg_tokens": 2}),
        {"class_token": False, "no_embed_class": True},
        {"act_layer": "quick_gelu"},
    ],
    ids=lambda part: next(iter(part)),
)
def test_parts_that_open_clip_lacks_are_refused(part: dict[str, Any]) -> None:
    _, ours = make_pair()
    image = ours.config.image_encoder_args | part
    with torch.device("meta"), pytest.raises(ValueError, match=r"vit_"):
        to_open_clip(CoCa(ours.config, image_encoder_args=image))


def test_models_that_open_clip_lacks_are_refused() -> None:
    for overrides, reason in (
        ({"pooler": "parallel"}, "it has the parallel"),
        ({"tokenizer": ["a"]}, "has a tokenizer"),
    ):
        with torch.device("meta"), pytest.raises(ValueError, match=reason):
            to_open_clip(create_model("coca_vit_b32", **overrides))


def relative(**vision: Any) -> dict[str, Tensor]:
    """The state dict of a CoCa that OpenCLIP 3.3 builds with other arguments of its image tower."""
    return OpenClipCoCa(64, vision_cfg={**VISION, **vision}, text_cfg=TEXT, multimodal_cfg=DECODER).state_dict()


def named(*names: str) -> Callable[[], dict[str, Tensor]]:
    """A state dict with tensors of these names, for what OpenCLIP 3.3 cannot build."""
    return lambda: {name: torch.zeros(1) for name in ("logit_scale", *names)}


@pytest.mark.parametrize(
    ("state", "called"),
    [
        (lambda: relative(attentional_pool=False), "a coca_base, which has no attentional pooler"),
        (lambda: relative(timm_model_name="resnet10t"), "a CoCa whose image tower is not a CLIP vision transformer"),
        (named("text_decoder.ln_final.weight", "text.transformer.embeddings.x.weight"), "a coca_roberta-ViT-B-32"),
        (
            named("attn_pool_contrastive.query", "visual.trunk.x", "text_decoder.ln_final.weight"),
            "a CoCa whose image tower is not a CLIP vision transformer",
        ),
    ],
)
def test_relatives_that_cannot_be_read_are_called_by_their_names(
    tmp_path: Path, state: Callable[[], dict[str, Tensor]], called: str
) -> None:
    torch.save(state(), tmp_path / "model.pt")
    for load in (load_model, load_dual_encoder):
        with pytest.raises(ValueError, match=f"this is {called}"):
            load(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text.ln_final.weight": None}, "the checkpoint has no tensor 'text.ln_final.weight'"),
        ({"visual.proj": None}, "the checkpoint has no tensor 'visual.proj'"),
        ({"text_decoder.cross_attn.0.attn.in_proj_weight": None}, "no tensor 'text_decoder.cross_attn.0.attn.in_proj"),
        (
            {"text.transformer.resblocks.0.mlp.c_fc.bias": torch.zeros(7)},
            r"c_fc.bias' has the shape \(7,\) in the check",
        ),
    ],
)
def test_damaged_state_dicts_name_the_tensor(change: dict[str, Tensor | None], message: str) -> None:
    theirs, _ = make_pair()
    state = {name: tensor for name, tensor in (theirs.state_dict() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        from_open_clip(state, text_heads=4)
