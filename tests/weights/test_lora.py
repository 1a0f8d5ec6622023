"""Low-rank adaptation: no change at first, nothing but A and B trains, and a file gives an ordinary model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coca_lit.models import CoCa
from coca_lit.weights import MODEL_KEY
from coca_lit.weights.load import load_model, save_model
from coca_lit.weights.lora import PARTS, LowRank, add_lora, merged

Build = Callable[..., CoCa]
TEXTS = ["a small red circle above a large blue ring", "a large green star"]


def outputs(model: CoCa) -> tuple[Tensor, ...]:
    """Features, caption logits and captions."""
    images, tokens = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), model.tokenizer(TEXTS)
    with torch.no_grad():
        out = model.eval()(images, tokens)
        assert out.image_features is not None
        assert out.text_features is not None
        return out.image_features, out.text_features, out.logits, model.generate(images)


def disturb(model: CoCa) -> None:
    """As if it had been trained."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, LowRank):
            nn.init.normal_(module.b, std=0.05)


def test_the_update_is_divided_by_its_rank() -> None:
    """W + 4/2 · B A with W = 0, B = (1 2; 0 1) and A = (1 0 1; 0 1 1), so B A = (1 2 3; 0 1 1)."""
    update = LowRank(torch.zeros(2, 3), rank=2, alpha=4.0)
    update.a.data = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    update.b.data = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    assert torch.equal(update(torch.zeros(2, 3)), torch.tensor([[2.0, 4.0, 6.0], [0.0, 2.0, 2.0]]))


def test_nothing_changes_at_first(tiny_model: Build) -> None:
    before = outputs(tiny_model())
    model = tiny_model()
    add_lora(model, rank=2)
    torch.testing.assert_close(outputs(model), before, atol=1e-5, rtol=0)
    disturb(model)
    assert not torch.allclose(outputs(model)[0], before[0], atol=1e-3)


@pytest.mark.parametrize("adapted", [PARTS, ("image_encoder", "text.blocks")])
def test_only_the_updates_of_the_parts_train(tiny_model: Build, adapted: tuple[str, ...]) -> None:
    model = tiny_model()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    names = add_lora(model, rank=2, parts=adapted)
    disturb(model)
    model.train()
    out = model(torch.randn(2, 3, 32, 32), model.tokenizer(TEXTS))
    (out.logits.square().mean() + (out.image_features - out.text_features).abs().sum() + out.logit_scale).backward()
    updates = {f"{name.removesuffix('weight')}parametrizations.weight.0.{part}" for name in names for part in "ab"}
    outside = {name for name in before if not name.startswith(adapted)}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == updates | outside
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name for name in updates if name.startswith("text.")} <= moved  # a ResNet's branches end in zeros at first


def test_matrices_kernels_and_norms(tiny_model: Build) -> None:
    model = tiny_model()
    model.freeze("text.blocks.0")
    names = add_lora(model, rank=8, parts=["image_encoder", "text"])
    assert "text.blocks.1.attention.qkv.weight" in names
    assert "image_encoder.trunk.layer1.0.conv1.weight" in names
    assert not any(name.startswith(("text.blocks.0.", "decoder.")) for name in names)
    assert "image_encoder.trunk.conv1.0.weight" in names
    norms = [m for m in model.train().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert not any(norm.training for norm in norms)  # their statistics belong to the fixed weights
    assert model.text.dropout.training


def test_an_embedding_that_another_part_shares_trains_on(tiny_model: Build) -> None:
    model = tiny_model(tied_embeddings=True)
    before = {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("decoder.")}
    add_lora(model, rank=2, parts=["decoder"])
    assert {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("decoder.")} == before
    add_lora(model, rank=2, parts=["text", "decoder.vocabulary"])
    assert not model.text.token_embedding.weight.requires_grad


@pytest.mark.parametrize("tied", [False, True])
def test_whoever_reads_the_file_gets_the_sum(tiny_model: Build, tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tied_embeddings=tied)
    names = add_lora(model, rank=3, alpha=6)
    disturb(model)
    state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, MODEL_KEY: model.config.stored()}, tmp_path / "last.ckpt")
    save_model(model, tmp_path / "model.safetensors")
    expected: tuple[Tensor, ...] = outputs(model)
    for file in ("last.ckpt", "model.safetensors"):
        ordinary = load_model(tmp_path / file)
        assert ordinary.state_dict().keys() == tiny_model().state_dict().keys()
        torch.testing.assert_close(outputs(ordinary), expected, atol=1e-5, rtol=0)
        for name in names:
            assert torch.equal(ordinary.get_parameter(name), model.get_submodule(name.removesuffix(".weight")).weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"alpha": 0}, "alpha must be a number above 0, got 0"),
        ({"parts": ["txt"]}, "parts: nothing in the model is called txt; its parts: image_encoder, pooling"),
        ({"parts": ["text.norm"]}, "no matrix in text.norm is trained and has more than 8 rows and columns"),
    ],
)
def test_wrong_arguments(tiny_model: Build, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_lora(tiny_model(), **arguments)


@pytest.mark.parametrize(
    "forged",
    [{"scale": (1000, 1, 1)}, {"b": (4, 1, 2)}, {"a": (2, 4, 1)}, {"a": (8,)}, {"b": (16, 2)}, {"a": (2, 16)}],
    ids=str,
)
def test_an_update_of_another_size_is_refused(forged: dict[str, tuple[int, ...]]) -> None:
    """It could be added all the same, and make of a small matrix a large one."""
    sizes = {"original": (4, 4), "0.a": (2, 4), "0.b": (4, 2), "0.scale": ()}
    sizes |= {f"0.{part}": size for part, size in forged.items()}
    with pytest.raises(ValueError, match="low-rank update of 'out' has another size"):
        merged({f"out.parametrizations.weight.{part}": torch.ones(size) for part, size in sizes.items()})
