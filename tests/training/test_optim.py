"""Which parameters decay, and learning rates by hand."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from coca_lit.callbacks.resumed import apply_settings
from coca_lit.errors import ConfigError
from coca_lit.lit_module import CoCaLit
from coca_lit.models import CoCa
from coca_lit.testing import ENCODER as VIT
from coca_lit.training.optim import AdamW, Timm, optimizer_of, warmup_cosine, warmup_stable_decay
from helpers.running import run

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


@pytest.mark.parametrize("frozen", [(), (0,), (1,)])
def test_one_optimizer_trains_the_network_and_what_objectives_add(tiny_model: Build, frozen: tuple[int, ...]) -> None:
    modules: list[nn.Module] = [tiny_model(), nn.ModuleDict({"mine": nn.Linear(3, 2)})]
    for number in frozen:
        modules[number].requires_grad_(False)
    optimizer = optimizer_of(AdamW(lr=0.1), *modules)
    found = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    wanted = {id(p) for number, module in enumerate(modules) if number not in frozen for p in module.parameters()}
    assert len(found) == len(wanted)
    assert set(found) == wanted


def test_the_image_encoder_learns_more_slowly(tiny_model: Build) -> None:
    model = tiny_model()
    names = {id(p): name for name, p in model.named_parameters()}
    for options, top in (({}, 2.0), ({"layer_decay": 0.5}, 1.0)):
        optimizer = AdamW(lr=8.0, image_factor=0.25, **options)(model)
        rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert max(rate for name, rate in rates.items() if name.startswith("image_encoder.")) == top
        assert rates["decoder.vocabulary.weight"] == rates["image_projection.weight"] == 8
        assert rates["text.blocks.1.attention.qkv.weight"] == (4 if options else 8)


def test_rates_that_fall_need_layers(tiny_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder of one's own may tell none."""
    model = tiny_model()
    monkeypatch.setattr(model.image_encoder, "depths", lambda: {})
    with pytest.raises(ValueError, match="layer_decay: the image_encoder"):
        AdamW(lr=8.0, layer_decay=0.5)(model)
    model.freeze("image_encoder")
    AdamW(lr=8.0, layer_decay=0.5)(model)


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
    kept = ("pos_embed", "cls_token", "position_embedding", "cls_embedding", "query")
    assert decayed == {name for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith(kept)}
    scheduler = warmup_cosine(optimizer, 0, 2)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [
        group["initial_lr"] / 2 for group in optimizer.param_groups
    ]


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
        ({"lr": 1e-3, "weight_decay": -1}, "weight_decay must be a number of at least 0, got -1"),
        ({"lr": 1e-3, "layer_decay": 0}, "layer_decay must be a number above 0 and at most 1, got 0"),
        ({"lr": 1e-3, "image_factor": 1.5}, "image_factor must be a number above 0 and at most 1, got 1.5"),
        ({"lr": 1e-3, "eps": None}, "eps must be a number of at least 0, got None"),
        *(
            ({"lr": 1e-3, "betas": betas}, r"betas must be two numbers of at least 0 and below 1, got")
            for betas in ([0.9, 0.98, 0.5], 0.9, [0.9, float("nan")])
        ),
    ],
)
def test_wrong_numbers(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(**arguments)


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


@pytest.mark.parametrize(("total", "warns"), [(8, False), (7, True), (3, True), (2, False)])
def test_a_warmup_longer_than_the_run(
    total: int, warns: bool, tiny_model: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    module = CoCaLit(tiny_model(), AdamW(lr=1e-3), warmup_steps=8)
    module.trainer = SimpleNamespace(estimated_stepping_batches=total)  # type: ignore[assignment]
    module.configure_optimizers()
    assert ("model.warmup_steps" in capsys.readouterr().out) == warns


@pytest.mark.parametrize("steps", [-5, 2.5])
def test_a_warmup_is_a_number_of_steps(steps: Any, tiny_model: Build) -> None:
    with pytest.raises(ValueError, match=f"warmup_steps must be a whole number of at least 0, got {steps}"):
        CoCaLit(tiny_model(), AdamW(lr=1e-3), warmup_steps=steps)


# timm's optimizers


def test_optimizers_of_timm_have_the_same_groups(tiny_model: Build) -> None:
    model = tiny_model(pooler="parallel", **VIT)
    expected = AdamW(lr=1e-3, weight_decay=0.3, layer_decay=0.5)(model)
    found = Timm("lion", lr=1e-3, weight_decay=0.3, layer_decay=0.5)(model)
    assert type(found).__name__ == "Lion"

    def plain(optimizer: torch.optim.Optimizer) -> list[tuple[float, float, list[int]]]:
        return [(g["lr"], g["weight_decay"], [id(p) for p in g["params"]]) for g in optimizer.param_groups]

    assert plain(found) == plain(expected)


def test_muon_is_for_matrices_that_transform(tiny_model: Build) -> None:
    model = tiny_model(**VIT)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = Timm("muon", lr=1e-3)(model)
    muon = {names[id(p)] for g in optimizer.param_groups if not g["use_fallback"] for p in g["params"]}
    assert "text.blocks.0.attention.qkv.weight" in muon
    assert not muon & {"text.token_embedding.weight", "decoder.vocabulary.weight", "text.position_embedding"}
    assert all(p.ndim > 1 for name, p in model.named_parameters() if name in muon)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.2, 0.0}


@pytest.mark.parametrize("name", ["muon", "lion"])
def test_an_optimizer_goes_on_from_its_state(name: str) -> None:
    """Five steps in one go, and three and two over a state that was saved: the same bits."""

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for i in numbers:
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 4))

    make = Timm(name, lr=1e-2)
    whole, first, second = network(), network(), network()
    steps(whole, make(whole), range(5))
    before = make(first)
    steps(first, before, range(3))
    second.load_state_dict(first.state_dict())
    after = make(second)
    after.load_state_dict(before.state_dict())
    steps(second, after, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_a_resumed_optimizer_has_the_arguments_of_this_run(tiny_model: Build) -> None:
    def trained(momentum: float) -> tuple[CoCaLit, Any]:
        module = CoCaLit(tiny_model(), Timm("muon", lr=1e-3, arguments={"momentum": momentum}))
        module.trainer = SimpleNamespace(estimated_stepping_batches=4)  # type: ignore[assignment]
        return module, module.configure_optimizers()

    (_, before), (module, now) = trained(0.7), trained(0.8)
    now["optimizer"].load_state_dict(before["optimizer"].state_dict())
    trainer: Any = SimpleNamespace(
        optimizers=[now["optimizer"]], lr_scheduler_configs=[SimpleNamespace(**now["lr_scheduler"])]
    )
    apply_settings(trainer, module.optimizer_settings)
    assert {group["momentum"] for group in now["optimizer"].param_groups} == {0.8}
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(before["optimizer"], 2)  # of a subclass
    trainer.lr_scheduler_configs = [SimpleNamespace(scheduler=schedule)]
    trainer.optimizers = [before["optimizer"]]
    apply_settings(trainer, module.optimizer_settings)
    assert {group["momentum"] for group in before["optimizer"].param_groups} == {0.7}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "lyon"}, "timm has no optimizer 'lyon'; did you mean 'lion'"),
        ({"name": "lion", "arguments": {"beta": 1}}, "timm's lion has no argument 'beta'; did you mean 'betas'"),
        ({"name": "lion", "arguments": {"betas": 3}}, r"timm's lion refuses arguments=\{'betas': 3\}: "),
    ],
)
def test_optimizers_that_timm_lacks(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Timm(lr=1e-3, **arguments)


# Warm-up, constant rate, cooldown


def test_cooldown_by_hand() -> None:
    def rates(total: int, cooldown: int) -> list[float]:
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=2.0)
        scheduler = warmup_stable_decay(optimizer, 2, total, cooldown)
        found = []
        for _ in range(total + 1):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    expected = [1.0, 2.0, 2.0, 2.0, 2 * (1 - 0.5), 2 * (1 - math.sqrt(0.5)), 2 * (1 - math.sqrt(0.75)), 0.0]
    assert rates(7, 4) == pytest.approx(expected)
    assert rates(5, 0)[:5] == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0])
    with pytest.raises(ConfigError, match=r"2 .* 4 .* 5 "):
        rates(5, 4)


@pytest.mark.slow
@pytest.mark.parametrize("length", [("trainer.max_epochs=2",), ("trainer.max_epochs=9", "trainer.max_steps=3")])
def test_a_branch_cools_down_from_a_trunk_with_the_same_bits(tmp_path: Path, length: tuple[str, ...]) -> None:
    """A trunk that ends with an epoch, or within one, and a branch from its checkpoint are one run of 6 steps, with
    Muon's state.
    """
    options = (
        *("trainer=cpu", "trainer.limit_val_batches=0", "data.batch_size=8", "data.train_count=16", "evals=[]"),
        *("model.warmup_steps=1", "model.optimizer._target_=coca_lit.training.optim.Timm", "model.optimizer.name=muon"),
        *("+model.net.text_layers=1", "+model.net.decoder_layers=1", "model.net.dropout=0.1"),
    )
    trunk, branch, straight = (tmp_path / name for name in ("trunk", "branch", "straight"))
    run(trunk, *options, *length, "model.cooldown_steps=0")
    checkpoint = f"ckpt_path={trunk}/checkpoints/last.ckpt"
    run(branch, *options, "trainer.max_epochs=3", "model.cooldown_steps=2", checkpoint)
    run(straight, *options, "trainer.max_epochs=3", "model.cooldown_steps=2")
    found, expected = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (branch, straight)
    )
    assert found["global_step"] == expected["global_step"] == 6
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], tensor), name
    before = torch.load(trunk / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not torch.equal(before["net.image_projection.weight"], found["state_dict"]["net.image_projection.weight"])
