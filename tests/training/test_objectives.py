"""Objectives added to the network's own: those that ship, and a user's."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from coca_lit.data.batch import Batch
from coca_lit.data.datamodule import ScenesDataModule
from coca_lit.errors import ConfigError
from coca_lit.lit_module import CoCaLit
from coca_lit.models import CoCa, CoCaOutput, create_model
from coca_lit.training.objectives import Captions, Function, Objective, terms_of
from coca_lit.training.optim import AdamW
from helpers.objectives import DrawnTargets, OwnCaptions, WordsOfImages, check_means

OPTIMIZER = AdamW(lr=1e-3)


@pytest.fixture(scope="module")
def net() -> CoCa:
    torch.manual_seed(0)
    return create_model("coca_tiny", tokenizer="scenes").eval()


@pytest.fixture(scope="module")
def scenes(net: CoCa) -> Batch:
    return next(iter(ScenesDataModule(tokenizer=net.tokenizer, batch_size=8, train_count=8).train_dataloader()))


class OfParts(Objective):
    """Says that it trains some parts."""

    def __init__(self, *trains: str) -> None:
        super().__init__(parts=1.0)
        self.trains = trains

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        return {"parts": net.logit_scale.sum()}


@pytest.mark.parametrize(
    ("trains", "weights", "tied"),
    [
        ("text", (0, 1), False),
        ("text.norm", (0, 1), False),
        ("decoder", (1, 0), False),
        ("decoder.self_blocks.0", (1, 0), False),
        ("decoder.self_blocks.0.norm_1.bias", (1, 0), False),
        ("decoder.norm", (1, 0), True),
    ],
)
def test_what_an_objective_trains_is_not_frozen_at_any_depth(
    trains: str, weights: tuple[float, float], tied: bool
) -> None:
    net = create_model("coca_tiny", tied_embeddings=tied)
    alone = create_model("coca_tiny", tied_embeddings=tied)
    CoCaLit(net, OPTIMIZER, 0, *weights, objectives={"parts": OfParts(trains)})
    CoCaLit(alone, OPTIMIZER, 0, *weights)
    found, before = ({n for n, p in model.named_parameters() if not p.requires_grad} for model in (net, alone))
    assert found == {name for name in before if not f"{name}.".startswith(f"{trains}.")}
    assert found < before


# A user's objectives


class Brightness(Objective):
    """Two terms and a parameter; the network should guess how bright an image is."""

    def __init__(self, weight: float = 1.0, name: str = "brightness") -> None:
        super().__init__(**{name: weight, "shift": 0.5})
        self.name = name

    def build(self, net: CoCa) -> None:
        self.head = torch.nn.Linear(net.config.embed_dim, 1)

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        guess = self.head(net.encode_image(batch.images))[:, 0]
        self.measures = {"guess": guess.mean().item()}
        truth = batch.images.float().flatten(1).mean(dim=1) / 255
        return {self.name: (guess - truth).square().mean(), "shift": self.head.bias.square().sum()}


class Gap(Objective):
    needs = ("image_features", "text_features")

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        self.measures = {"gap": 7.0}
        return {"gap": (out.image_features - out.text_features).square().sum()}


def test_weighted_terms_are_added_and_logged_raw(scenes: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    net = create_model("coca_tiny", tokenizer="scenes").eval()
    objective = Brightness(weight=3.0)
    objectives = {"bright": objective, "gap": Gap(), "none": None}
    module, logged = CoCaLit(net, OPTIMIZER, 0, 0.25, 2.0, objectives=objectives), {}
    torch.nn.init.ones_(objective.head.bias)
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    monkeypatch.setattr(module, "log", lambda *_: None)
    monkeypatch.setattr(module, "logs_this_step", lambda: True)
    loss = module.training_step(scenes, 0)
    own = {f"train/{name}_loss": term.detach() for name, term in objective(net, scenes).items()}
    assert own["train/shift_loss"] == 1
    assert logged["train/guess"] == pytest.approx(objective.measures["guess"])
    assert logged["train/gap"] == 7.0  # of a term of the shared pass
    torch.testing.assert_close({name: logged[name] for name in own}, own)
    weights = {"contrastive": 0.25, "caption": 2, "brightness": 3, "shift": 0.5, "gap": 1}
    assert loss.item() == pytest.approx(sum(weight * logged[f"train/{name}_loss"] for name, weight in weights.items()))


class OfBoth(Objective):
    needs = ("image_features",)

    def __init__(self, one: float, other: float) -> None:
        super().__init__(one=one, other=other)

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        return {name: out.image_features.sum(dim=1).square().mean() for name in self.weights}


def test_one_of_two_terms_may_have_no_weight(scenes: Batch) -> None:
    net = create_model("coca_tiny", tokenizer="scenes")
    losses = [
        CoCaLit(net, OPTIMIZER, 0, 0.0, 0.0, objectives={"mine": OfBoth(*weights)}).training_step(scenes, 0).item()
        for weights in ((2.0, 0.0), (1.0, 1.0))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with pytest.raises(ValueError, match=r"one_weight and other_weight of 0.*objectives\.mine=null"):
        CoCaLit(net, OPTIMIZER, objectives={"mine": OfBoth(0.0, 0.0)})


class OnlyForward(Objective):
    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        return {"mine": net.encode_image(batch.images).square().sum()}


def squares(net: CoCa, batch: Batch, factor: float = 1.0) -> dict[str, Tensor]:
    return {"mine": factor * net.encode_image(batch.images).square().sum()}


@pytest.mark.parametrize(
    "objective", [OnlyForward(), squares, partial(squares, factor=1.0)], ids=["class", "function", "partial"]
)
def test_a_forward_or_a_function_is_enough(scenes: Batch, objective: Any) -> None:
    module = CoCaLit(create_model("coca_tiny"), OPTIMIZER, 0, 0.0, 0.0, objectives={"mine": objective})
    loss = module.training_step(scenes, 0)
    assert loss.item() == pytest.approx(len(scenes.images), rel=1e-5)  # features of unit length


def test_what_a_model_is_saved_without_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    objectives = {"kept": WordsOfImages(), "own": Brightness(), "function": squares}
    module = CoCaLit(create_model("coca_tiny", tokenizer="scenes"), OPTIMIZER, objectives=objectives)
    module.on_fit_start()
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert "model.objectives.own " in note


def test_an_objective_that_returns_no_terms_is_named(scenes: Batch) -> None:
    objectives = {"good": squares, "mine": lambda net, batch: net.encode_image(batch.images).sum()}
    module = CoCaLit(create_model("coca_tiny"), OPTIMIZER, 0, 0.0, 0.0, objectives=objectives)
    with pytest.raises(ConfigError, match=r"^model\.objectives\.mine .*Tensor"):
        module.training_step(scenes, 0)


def test_an_objective_without_a_term_for_a_batch_is_named(scenes: Batch) -> None:
    module = CoCaLit(create_model("coca_tiny"), OPTIMIZER, 0, 0.0, 0.0, objectives={"mine": lambda net, batch: {}})
    with pytest.raises(ConfigError, match=r"^model\.objectives\.mine .*no term"):
        module.training_step(scenes, 0)


def test_a_loss_that_another_replaces_is_not_trained_but_validated(net: CoCa, scenes: Batch) -> None:
    drawn = DrawnTargets()
    drawn.captions = dict.fromkeys(scenes.keys)
    module = CoCaLit(net, OPTIMIZER, objectives={"drawn": drawn})
    terms = {}
    for stage in (True, False):
        module.train(stage)
        terms[stage] = set(terms_of(net, module.objectives_of(scenes), scenes).values)
    assert terms == {True: {"contrastive", "drawn"}, False: {"contrastive", "caption"}}


class OfMine(Objective):
    needs = ("image_features",)

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        return {"contrastive": out.image_features.sum()}


def caption(net: CoCa, batch: Batch) -> dict[str, Tensor]:
    return {"caption": net.logit_scale.sum()}


@pytest.mark.parametrize(
    ("mine", "term"),
    [(squares, "mine"), (caption, "caption"), (OfMine(), "contrastive")],
    ids=["twice", "ours", "shared"],
)
def test_a_term_with_the_name_of_another_is_refused(scenes: Batch, mine: Any, term: str) -> None:
    net = create_model("coca_tiny", tokenizer="scenes")
    module = CoCaLit(net, OPTIMIZER, objectives={"first": OnlyForward(), "second": mine})
    with pytest.raises(ConfigError, match=rf"^model\.objectives\.second: .*'{term}'"):
        module.training_step(scenes, 0)
    CoCaLit(net, OPTIMIZER, objectives={"first": squares}).training_step(scenes, 0)


@pytest.mark.parametrize(
    ("objectives", "said"),
    [
        ({"a": Brightness(name="caption")}, "objectives.a.*'caption'"),
        ({"a": Brightness(), "b": Brightness()}, "objectives.b.*'brightness'"),
        ({"a": 3}, "objectives.a.*3"),
    ],
)
def test_objectives_that_cannot_join_are_refused(objectives: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CoCaLit(create_model("coca_tiny"), OPTIMIZER, objectives=objectives)


# Means over tokens


@pytest.mark.parametrize(
    ("objective", "term", "over_tokens"),
    [
        (Captions(1.0), "caption", True),
        (OwnCaptions(), "own_captions", True),
        (Function(lambda net, batch: {"mine": net.encode_image(batch.images).square().mean()}), "mine", False),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Objective) else "",
)
def test_objectives_know_whether_two_batches_have_the_mean_of_both(
    objective: Objective, term: str, over_tokens: bool
) -> None:
    """Where the mean of both batches is not that of the whole, accumulation is refused."""
    check_means(objective, term, over_tokens)
