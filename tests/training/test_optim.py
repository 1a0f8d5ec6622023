"""Which parameters decay, and learning rates by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from coca_lit.models import CoCa
from coca_lit.training.optim import AdamW, decays, warmup_cosine

VIT = {
    "image_encoder": "vit_base_patch32_clip_224",
    "image_encoder_args": {"patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2},
}
Build = Callable[..., CoCa]


def groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[float, set[str]]:
    """{weight decay: names of the parameters that have it}"""
    names = {id(p): name for name, p in model.named_parameters()}
    return {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}


def test_matrices_decay_and_nothing_else(tiny_model: Build) -> None:
    model = tiny_model(pooler="parallel", **VIT)
    split = groups(model, AdamW(lr=1e-3, weight_decay=0.3)(model))
    assert set(split) == {0.3, 0.0}
    assert split[0.3] | split[0.0] == {name for name, _ in model.named_parameters()}
    for name in (
        "text.token_embedding.weight",
        "text.blocks.0.attention.qkv.weight",
        "decoder.vocabulary.weight",
        "image_encoder.trunk.patch_embed.proj.weight",
        "image_projection.weight",
        "pooling.contrastive.attention.kv.weight",
    ):
        assert name in split[0.3]
    for name in (
        "logit_scale",
        "text.position_embedding",
        "text.cls_embedding",
        "text.norm.weight",
        "text.blocks.0.attention.qkv.bias",
        "pooling.contrastive.query",
        "pooling.generative.query",
        "image_encoder.trunk.pos_embed",
        "image_encoder.trunk.cls_token",
    ):
        assert name in split[0.0]


def test_kernels_decay_and_batch_norms_do_not(tiny_model: Build) -> None:
    model = tiny_model(image_encoder="tf_efficientnet_lite0", image_encoder_args={})
    split = groups(model, AdamW(lr=1e-3, weight_decay=0.1)(model))
    assert "image_encoder.trunk.conv_stem.weight" in split[0.1]
    assert "image_encoder.trunk.bn1.weight" in split[0.0]


def test_decays_looks_at_the_last_part_of_the_name() -> None:
    matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    assert decays("query.weight", matrix)
    assert not decays("pooling.query", matrix)
    assert not decays("layer.bias", vector)


def test_frozen_parameters_are_left_out(tiny_model: Build) -> None:
    model = tiny_model()
    frozen = set(model.freeze("image_encoder", "text"))
    split = groups(model, AdamW(lr=1e-3)(model))
    assert not (split[0.2] | split[0.0]) & frozen


def test_no_empty_group() -> None:
    layer = nn.Linear(2, 2, bias=False)
    assert len(AdamW(lr=1e-3)(layer).param_groups) == 1


def test_the_image_encoder_learns_more_slowly(tiny_model: Build) -> None:
    model = tiny_model()
    names = {id(p): name for name, p in model.named_parameters()}
    for options, top in (({}, 2.0), ({"layer_decay": 0.5}, 1.0)):
        optimizer = AdamW(lr=8.0, image_factor=0.25, **options)(model)
        rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert max(rate for name, rate in rates.items() if name.startswith("image_encoder.")) == top
        assert rates["decoder.vocabulary.weight"] == 8
        assert rates["text.blocks.1.attention.qkv.weight"] == (4 if options else 8)


def test_learning_rates_fall_from_layer_to_layer(tiny_model: Build) -> None:
    """Exponents by hand: 1 for the last layer of a tower, one more for each before it, the embeddings last."""
    deep = VIT | {"image_encoder_args": VIT["image_encoder_args"] | {"depth": 2}}  # type: ignore[operator]
    model = tiny_model(text_layers=3, **deep)
    optimizer = AdamW(lr=8.0, layer_decay=0.5, weight_decay=0.3)(model)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert set(rates) == set(names.values())
    expected = {
        "image_encoder.trunk.blocks.1.": 4,
        "image_encoder.trunk.blocks.0.": 2,
        "image_encoder.trunk.": 1,  # patches, positions, class token and the norm before the blocks
        "text.blocks.2.": 4,
        "text.blocks.1.": 2,
        "text.blocks.0.": 1,
        "text.token_embedding.": 0.5,
        "text.position_embedding": 0.5,
        "text.cls_embedding": 0.5,
        "": 8,  # poolers, projections, norm of the CLS state, decoder, temperature
    }
    for name, rate in rates.items():
        assert rate == next(value for prefix, value in expected.items() if name.startswith(prefix)), name
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {name for name, p in model.named_parameters() if decays(name, p)}
    scheduler = warmup_cosine(optimizer, 0, 2)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [
        group["initial_lr"] / 2 for group in optimizer.param_groups
    ]


def test_stages_of_a_resnet_are_layers(tiny_model: Build) -> None:
    model = tiny_model()
    optimizer = AdamW(lr=1.0, layer_decay=0.5)(model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trunk = model.image_encoder.trunk
    assert rates[id(trunk.layer4[0].conv1.weight)] == 0.5
    assert rates[id(trunk.layer1[0].conv1.weight)] == 1 / 16
    assert rates[id(trunk.conv1[0].weight)] == 1 / 32


def test_no_layer_decay_leaves_two_groups(tiny_model: Build) -> None:
    assert len(AdamW(lr=1e-3)(tiny_model()).param_groups) == 2
    assert len(AdamW(lr=1e-3, layer_decay=0.5)(nn.Linear(2, 2)).param_groups) == 2


def test_defaults_are_those_of_clip() -> None:
    defaults = AdamW(lr=1e-3)(nn.Linear(2, 2)).defaults
    assert (defaults["betas"], defaults["eps"]) == ((0.9, 0.98), 1e-6)


def test_first_step_by_hand() -> None:
    """Adam's first step is lr · g / (|g| + eps), after a decay of lr · weight decay · w that spares the bias."""
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, 2.0)
    nn.init.constant_(layer.bias, 2.0)
    optimizer = AdamW(lr=0.1, weight_decay=0.5)(layer)
    (3 * layer(torch.ones(1))).sum().backward()
    optimizer.step()
    assert layer.weight.item() == pytest.approx(2 - 0.1 * 0.5 * 2 - 0.1, abs=1e-5)
    assert layer.bias.item() == pytest.approx(2 - 0.1, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1e-3}, "lr must be a number of at least 0, got -0.001"),
        ({"lr": "1e-3"}, "lr must be a number of at least 0, got '1e-3'"),
        ({"lr": True}, "lr must be a number"),
        ({"lr": 1e-3, "weight_decay": -1}, "weight_decay must be a number of at least 0, got -1"),
        ({"lr": 1e-3, "layer_decay": 0}, "layer_decay must be a number above 0 and at most 1, got 0"),
        ({"lr": 1e-3, "layer_decay": 1.1}, "layer_decay must be a number above 0 and at most 1, got 1.1"),
        ({"lr": 1e-3, "image_factor": 0}, "image_factor must be a number above 0 and at most 1, got 0"),
        ({"lr": 1e-3, "eps": None}, "eps must be a number of at least 0, got None"),
    ],
)
def test_wrong_numbers(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(**arguments)(nn.Linear(2, 2))


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="nothing is left to train"):
        AdamW(lr=1e-3)(nn.Linear(2, 2).requires_grad_(False))


def learning_rates(warmup_steps: int, total_steps: int, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=2.0)
    scheduler = warmup_cosine(optimizer, warmup_steps, total_steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_warmup_then_cosine_by_hand() -> None:
    root = math.sqrt(0.5)  # cos of an eighth of a turn
    expected = [0.5, 1.0, 1.5, 2.0, 2.0, 1 + root, 1.0, 1 - root, 0.0, 0.0]
    assert learning_rates(warmup_steps=4, total_steps=8, steps=10) == pytest.approx(expected, abs=1e-9)


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rates(warmup_steps=0, total_steps=2, steps=4) == pytest.approx([2.0, 1.0, 0.0, 0.0], abs=1e-9)


def test_a_run_shorter_than_its_warmup_only_rises() -> None:
    assert learning_rates(warmup_steps=4, total_steps=2, steps=3) == pytest.approx([0.5, 1.0, 1.5])
