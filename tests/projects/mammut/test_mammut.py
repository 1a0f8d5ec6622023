"""MaMMUT computes what a second implementation computes from the same file, and so do files of openMaMMUT."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import mammut_oracle
import pytest
import torch
from small_mammut import NEW, RELEASED, WITHOUT_MLP, make, released_files
from torch import Tensor

from coca_lit.lit_module import CoCaLit
from coca_lit.losses import loss_terms
from coca_lit.models import CoCa, create_model
from coca_lit.models.coca import CAPTION, CONTRASTIVE
from coca_lit.tools.export.open_clip import write_open_clip
from coca_lit.training.optim import AdamW
from coca_lit.training.sharding import blocks
from coca_lit.weights.open_clip import from_open_clip, to_open_clip
from coca_lit.weights.open_clip.config import open_clip_config
from helpers import oracle
from helpers.family import check_cached_generation, check_files, check_packed_training
from helpers.open_clip_4 import SMALL, TEXTS, same

HEADS = 2


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(len(TEXTS), 3, 16, 16, generator=torch.Generator().manual_seed(1))


KINDS = pytest.mark.parametrize("arguments", [NEW, RELEASED, WITHOUT_MLP], ids=["MaMMUT2", "openMaMMUT", "without MLP"])


@KINDS
@torch.no_grad()
def test_mammut_equals_the_oracle(images: Tensor, arguments: dict[str, Any]) -> None:
    """Class token and pads count in the released models alone; the contrastive pass never sees the image."""
    released = arguments is not NEW
    model, state, s = make(**arguments)
    tokens = model.tokenizer(TEXTS)
    out = model(images, tokens)
    logits = []
    for i, (image, ids) in enumerate(zip(images.double(), tokens.tolist(), strict=True)):
        feature, context = mammut_oracle.image_side(s, oracle.vision_tokens(s, image, 3), class_token=released)
        assert len(context) == (5 if released else 4)
        same(out.image_features[i], oracle.unit(feature))
        real = ids[: ids.index(49407) + 1]
        text, other = (
            oracle.unit(mammut_oracle.text_feature(s, seen, HEADS)) for seen in (ids, real)[:: 1 if released else -1]
        )
        same(out.text_features[i], text)
        if len(real) < len(ids):
            assert (text - other).abs().max() > 1e-3
        logits.append(mammut_oracle.logits(s, real[:-1], context, HEADS, ratio=2))
    same(out.logits, torch.cat(logits))
    assert torch.equal(model(images.flip(0), tokens).text_features, out.text_features)
    short = model.encode_text(tokens[2:3, :6])  # its length changes nothing
    torch.testing.assert_close(short, out.text_features[2:3], atol=1e-5, rtol=0)
    again = to_open_clip(model, "mammut" if arguments is WITHOUT_MLP else "4")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


@torch.no_grad()
def test_file_of_the_released_openmammut(images: Tensor) -> None:
    """Older names of one tensor and of the config's keys."""
    model, old, fork = released_files()
    for found in (from_open_clip(old, deepcopy(fork)), from_open_clip(old, text_heads=HEADS, **HEADS_OF_IMAGE)):
        arguments = {key: getattr(found.config, key) for key in RELEASED}
        for part in ("text_tower", "pooler"):  # "module:name"
            arguments[part] = arguments[part].rpartition(":")[2]
        assert arguments == RELEASED
        tokens = model.tokenizer(TEXTS)
        for a, b in zip(found.eval()(images, tokens)[:4], model(images, tokens)[:4], strict=True):
            assert torch.equal(a, b)
    fork["text_cfg"]["has_mlp"] = False
    with pytest.raises(ValueError, match=r"has_mlp is False"):
        from_open_clip(old, fork)


def test_blocks_without_an_mlp() -> None:
    """The tensors show them without a config. They are those before a cross block, in every file that has any."""
    model, state, _ = make(**WITHOUT_MLP)
    assert "text.resblocks.0.mlp.c_fc.weight" not in state
    assert "text.resblocks.1.ln_2.weight" in state
    found = from_open_clip(state, text_heads=HEADS, **HEADS_OF_IMAGE)
    assert found.config == model.config
    config = open_clip_config(model, "mammut")
    for key, value in (("has_mlp", True), ("cross_attn_ratio", 3)):
        wrong = deepcopy(config)
        wrong["model_cfg"]["text_cfg"][key] = value
        with pytest.raises(ValueError, match="other weights"):
            from_open_clip(state, wrong)
    with pytest.raises(ValueError, match="version=mammut"):
        to_open_clip(model)
    del state["text.resblocks.1.mlp.c_fc.weight"]
    with pytest.raises(ValueError, match=r"other weights"):
        from_open_clip(state, config)


HEADS_OF_IMAGE = {"image_encoder_args": SMALL["image_encoder_args"]}


@KINDS
def test_files_go_both_ways(tmp_path: Path, arguments: dict[str, Any]) -> None:
    model, _, _ = make(**arguments)
    check_files(model, tmp_path, "mammut" if arguments is WITHOUT_MLP else "4")
    if arguments is NEW:
        with pytest.raises(ValueError, match="mean_all"):
            write_open_clip(model, tmp_path, version="mammut")


@pytest.mark.parametrize("ratio", [3, 5])
@torch.no_grad()
def test_which_layers_look_at_the_image(images: Tensor, ratio: int) -> None:
    """Two of six do in the tensors, with any of these numbers: the config says which."""
    layers = {"text_layers": 6, "decoder_layers": 6, "decoder_args": {"cross_attention_every": ratio}}
    model, _, s = make(**NEW | layers)
    _, context = mammut_oracle.image_side(s, oracle.vision_tokens(s, images[0].double(), 3), class_token=False)
    tokens = model.tokenizer(TEXTS[:1])
    ids = tokens[0].tolist()
    expected = mammut_oracle.logits(s, ids[: ids.index(49407)], context, HEADS, ratio)
    same(model(images[:1], tokens).logits, expected)


@pytest.mark.parametrize("given", [{"cross_attn_ratio": 1}, {"cross_attn_ratio": 4}, {}])
def test_a_config_with_other_cross_attentions(given: dict[str, int]) -> None:
    """OpenCLIP's default is 1."""
    model, state, _ = make(**NEW)  # with every second layer of three
    config = open_clip_config(model, "4")
    del config["model_cfg"]["multimodal_cfg"]["cross_attn_ratio"]
    config["model_cfg"]["multimodal_cfg"] |= given
    with pytest.raises(ValueError, match=r"cross_attn_ratio \d, [13] of 3 .* 2 do"):
        from_open_clip(state, config)


def tiny(**overrides: Any) -> CoCa:
    torch.manual_seed(0)
    arguments = {"pooler": "mean", "text_tower": "two_pass", "text_layers": 3, "decoder_layers": 3}
    return create_model("coca_tiny", **arguments | overrides)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.tensor([5, 24, 2, 9])
    tokens = torch.randint(4, 40, (4, 24)).masked_fill(torch.arange(24) >= lengths[:, None], 0)
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), tokens, lengths


MLPS = pytest.mark.parametrize("tower_args", [None, {"attention_only_every": 2}], ids=["MLPs", "without MLP"])


@MLPS
def test_packed_training_equals_padded(monkeypatch: pytest.MonkeyPatch, tower_args: dict[str, int] | None) -> None:
    check_packed_training(tiny(text_tower_args=tower_args).double().train(), monkeypatch)


@MLPS
@torch.no_grad()
def test_cached_generation_equals_the_whole_pass(tower_args: dict[str, int] | None) -> None:
    model = tiny(text_tower_args=tower_args).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pixels, _, _ = batch()
    check_cached_generation(model, pixels)
    reranked = model.generate(pixels, strategy="beam", rerank="contrastive", return_attention=True, max_length=8)
    torch.testing.assert_close(reranked.attention[:, 1].sum(-1), torch.ones(len(pixels)))


def test_each_loss_alone_freezes_what_it_does_not_train() -> None:
    """The blocks of the text are trained by both losses, cross blocks and vocabulary by captions alone."""
    for weights, frozen in (
        ({"contrastive_weight": 0.0}, {"pooling.norm", "image_projection", "logit_scale"}),
        ({"caption_weight": 0.0}, {"pooling.to_text", "decoder"}),
    ):
        model = tiny()
        module = CoCaLit(model, AdamW(lr=1e-3), **weights)
        names = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert {next(part for part in frozen if name.startswith(part)) for name in names} == frozen
        pixels, tokens, lengths = batch()
        out = model(pixels, tokens, lengths, needs=CONTRASTIVE if module.loss_weights["contrastive"] else CAPTION)
        sum(loss_terms(out).values()).backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_a_copy_has_blocks_of_its_own() -> None:
    """As averaged weights need it: the decoder of a copy uses the tower of the copy, and no tensor appears twice."""
    model = tiny()
    copy = deepcopy(model)
    assert copy.decoder.tower is copy.text
    assert len(model.state_dict()) == len({p.data_ptr() for p in model.state_dict().values()})
    modules = [module for group in blocks(model) for module in group]
    assert len(modules) == len(set(modules))


@pytest.mark.parametrize(("preset", "count"), [("mammut2_ViT-B-32", 195_625_729), ("mammut2_ViT-L-14", 508_294_913)])
def test_sizes_of_the_presets(preset: str, count: int) -> None:
    with torch.device("meta"):
        model = create_model(preset)
    assert sum(p.numel() for p in model.parameters()) == count
    if preset == "mammut2_ViT-B-32":
        assert len(to_open_clip(model)) == 387


def test_initial_values() -> None:
    """The branches of a cross block count all layers of the text, as OpenCLIP's do, and not those with an image."""
    model = tiny(text_layers=4, decoder_layers=4)
    assert len(model.decoder.cross_blocks) == 2
    for block in model.decoder.cross_blocks:
        for layer in (block.attention.out, block.mlp[2]):
            assert layer.weight.std().item() == pytest.approx(96**-0.5 * (2 * 4) ** -0.5, rel=0.05)
