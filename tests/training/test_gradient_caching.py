"""Micro-batches against the whole batch: losses, gradients, whole runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from coca_lit.data.batch import Batch
from coca_lit.distributed import world_size
from coca_lit.errors import ConfigError
from coca_lit.lit_module import CoCaLit
from coca_lit.losses import caption_loss, contrastive_term, loss_terms
from coca_lit.models import CoCa, CoCaOutput, create_model
from coca_lit.models.coca import CAPTION, CONTRASTIVE
from coca_lit.testing import ENCODER, Step, own_batch, trained_with, with_further_captions
from coca_lit.training.gradient_caching import cached_loss, micro_batches, seeded
from coca_lit.training.objectives import Captions, Contrastive, Objective
from coca_lit.training.optim import AdamW
from helpers.objectives import FurtherTexts
from helpers.running import run
from helpers.slow import slow

WEIGHTS = {"contrastive": 1.0, "caption": 2.0}


def build(**model: Any) -> CoCa:
    torch.manual_seed(0)
    return create_model("coca_tiny", **ENCODER, **model).train()


def whole_loss(net: CoCa, batch: Batch, weights: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    outputs = {"contrastive": CONTRASTIVE, "caption": CAPTION}
    needs = [output for name, weight in weights.items() if weight for output in outputs[name]]
    terms = loss_terms(net(batch.images, batch.tokens, batch.lengths, needs=needs))
    return sum(weights[name] * term for name, term in terms.items()), terms


def cached(
    net: CoCa, batch: Batch, weights: Mapping[str, float], size: int = 2, smoothing: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    objectives = [Contrastive(weights["contrastive"]), Captions(weights["caption"], smoothing)]
    weighted = [objective for objective in objectives if any(objective.weights.values())]
    loss, terms = cached_loss(net, weighted, batch, size)
    return loss, terms.values


def gradients(net: CoCa) -> dict[str, Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [2, *slow(6)])
@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ({}, WEIGHTS),
        ({"pooler": "cascade", "cls_mask": "legacy"}, WEIGHTS),
        ({"contrastive": "siglip"}, WEIGHTS),
        ({"decoder_layers": 0, "pooler_queries": 1}, {"contrastive": 1.0, "caption": 0.0}),
        ({}, {"contrastive": 0.0, "caption": 1.0}),
    ],
    ids=["coca", "cascade", "siglip", "clip", "captioner"],
)
def test_micro_batches_equal_the_whole_batch(size: int, model: dict[str, Any], weights: dict[str, float]) -> None:
    net = build(**model).double()  # so that a gradient that is missing or counted twice cannot hide in rounding
    batch = own_batch(net, 0)
    loss, terms = whole_loss(net, batch, weights)
    (3 * loss).backward()  # as with a loss that is scaled, or divided for accumulation
    expected = gradients(net)
    net.zero_grad()
    found, found_terms = cached(net, batch, weights, size)
    (3 * found).backward()
    torch.testing.assert_close((found, found_terms), (loss, terms), atol=1e-10, rtol=0)
    torch.testing.assert_close(gradients(net), expected, atol=1e-10, rtol=0)


def test_smoothing_unknown_words_and_questions_count_as_in_the_whole_batch() -> None:
    net = build().double()
    batch = own_batch(net, 0)
    batch.tokens[:, 2] = net.tokenizer.unk_id
    questions = torch.arange(len(batch.images)) % 3 + 1
    terms = loss_terms(net(*batch[:3], prefix_lengths=questions), smoothing=0.1)
    _, found = cached(net, batch._replace(prefix_lengths=questions), WEIGHTS, smoothing=0.1)
    torch.testing.assert_close(found, terms, atol=1e-10, rtol=0)
    assert not torch.equal(found["caption"], loss_terms(net(*batch[:3]), smoothing=0.1)["caption"])


def one_graph(net: CoCa, batch: Batch) -> Tensor:
    """The loss of a batch by one graph through all micro-batches of 2, with the dropout that caching draws for each."""
    outs = []
    for part in micro_batches(batch, 2):
        with seeded(part.seed, torch.device("cpu")):
            outs.append(net(*part.batch[:3]))
    features = (torch.cat([out.image_features for out in outs]), torch.cat([out.text_features for out in outs]))
    hidden, labels = torch.cat([out.hidden for out in outs]), torch.cat([out.labels for out in outs])
    contrastive = contrastive_term(*features, outs[0].logit_scale, None)
    return contrastive + 2 * caption_loss(hidden, outs[0].vocabulary, labels)


def test_dropout_is_the_same_in_both_passes() -> None:
    net = build(dropout=0.3).double()
    batch = own_batch(net, 0)
    torch.manual_seed(7)
    one_graph(net, batch).backward()
    expected = gradients(net)
    net.zero_grad()
    torch.manual_seed(7)
    cached(net, batch, WEIGHTS)[0].backward()
    torch.testing.assert_close(gradients(net), expected, atol=1e-10, rtol=0)


def test_bf16_is_no_less_exact_than_the_whole_batch() -> None:
    """The value equals the same micro-batches in one graph. Gradients are accumulated in fp32; for a whole batch the
    sum happens within a bf16 product.
    """
    net = build()
    batch = own_batch(net, 0)
    whole_loss(net, batch, WEIGHTS)[0].backward()
    exact = gradients(net)
    found = {}
    for name, loss in (("whole", whole_loss), ("cached", cached)):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value, _ = loss(net, batch, WEIGHTS)
        value.backward()
        found[name] = gradients(net)
    with torch.autocast("cpu", torch.bfloat16):
        assert value.item() == pytest.approx(one_graph(net, batch).item(), rel=1e-6)
    for name, gradient in exact.items():
        error, usual = ((found[way][name] - gradient).norm() for way in ("cached", "whole"))
        assert error <= 1.5 * usual + 1e-3, name


def train(micro_batch_size: int | None) -> dict[str, Tensor]:
    """Weights after three steps in which two batches are accumulated, those of an objective included."""
    net = build()
    torch.manual_seed(1)
    objectives = {"mapped": Mapped()}
    module = CoCaLit(net, AdamW(lr=0.0), micro_batch_size=micro_batch_size, objectives=objectives)
    before = objectives["mapped"].map.weight.clone()
    step = Step(module)
    if world_size() > 1:
        step = DistributedDataParallel(step)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for i in range(3):
        optimizer.zero_grad()
        for k in range(2):
            (step(own_batch(net, 2 * i + k)) / 2).backward()
        optimizer.step()
    assert not objectives["mapped"].map.weight.equal(before)
    return {name: p.detach() for name, p in module.named_parameters()}


@pytest.mark.slow
def test_micro_batches_on_two_ranks_equal_the_whole_batch_on_one(on_ranks) -> None:
    expected = train(None)
    for result in on_ranks(2, train, 1):
        torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)


def test_only_a_micro_batch_goes_through_the_network() -> None:
    calls = []

    def watched(net: CoCa, given: tuple[Any, ...], asked: dict[str, Any]) -> None:
        calls.append((len(given[0]), "hidden" in asked["needs"], torch.is_grad_enabled()))

    net = build()
    net.register_forward_pre_hook(watched, with_kwargs=True)
    cached(net, own_batch(net, 0), WEIGHTS)
    assert calls == [(2, False, False)] * 3 + [(2, True, True)] * 3


class Spread(Objective):
    """A term of one output of the pass, of which it declares no weight."""

    def __init__(self, output: str) -> None:
        super().__init__()
        self.needs = (output,)

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        return {"spread": spread(getattr(out, self.needs[0]))}


def spread(output: Tensor) -> Tensor:
    """A function that couples all pairs of a batch."""
    rows = output.flatten(1)
    return (rows @ rows.T).square().mean()


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize(
    ("output", "model"),
    [
        ("image_features", {}),
        ("text_features", {}),
        ("pooled", {}),
        ("pooled", {"pooler": "parallel"}),
        ("image_tokens", {}),
        ("image_tokens", {"pooler": "parallel"}),
        ("encoded", {}),
        ("text_states", {}),
        ("text_states", {"cls_mask": "legacy"}),
        ("further_text_features", {}),
        ("further_text_features", {"cls_mask": "legacy"}),
        ("hidden", {}),
    ],
)
def test_a_term_of_one_output_is_the_only_loss(output: str, model: dict[str, Any], size: int | None) -> None:
    """What the term does not depend on is frozen, and everything else gets the gradient of the whole batch."""
    net = build(**model).double()
    batch = with_further_captions(net, 0)
    spread(one_output(net, batch, output)).backward()
    expected = gradients(net)
    net.zero_grad()
    module = CoCaLit(net, AdamW(lr=0.1), 0, 0.0, 0.0, micro_batch_size=size, objectives={"one": Spread(output)})
    module.training_step(batch, 0).backward()
    found = gradients(net)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-12)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == found.keys()


def one_output(net: CoCa, batch: Batch, output: str) -> Tensor:
    """An output of the pass by the methods of the parts."""
    images, tokens, lengths = batch[:3]
    if output == "image_features":
        return net.encode_image(images)
    if output == "text_features":
        return net.encode_text(tokens, lengths)
    if output == "further_text_features":
        rows = zip(batch.extras["further_tokens"], batch.extras["further_lengths"], strict=True)
        return torch.stack([net.encode_text(*captions) for captions in rows])
    if output == "pooled":
        return net.pooling(net.image_encoder(images))[0]
    if output == "image_tokens":
        return net.encode_image_tokens(images)
    if output == "encoded":
        return net.image_encoder(images)
    if output == "text_states":
        states = []
        for row, length in zip(tokens, lengths, strict=True):
            alone, _, _ = net.text(row[None, :length], length[None], contrastive=False)
            states.append(F.pad(alone[0, :length], (0, 0, 0, tokens.shape[1] - length)))
        return torch.stack(states)
    return net.captions_of(net.encode_image_tokens(images), tokens, lengths).hidden


class Mapped(Objective):
    """Has a parameter of its own."""

    needs = ("image_features", "text_features")

    def build(self, net: CoCa) -> None:
        self.map = torch.nn.Linear(net.config.embed_dim, 4, dtype=net.logit_scale.dtype)

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        return {"mapped": (self.map(out.image_features) - self.map(out.text_features)).square().mean()}


def test_parameters_of_a_term_of_features_get_the_gradient_of_the_whole_batch() -> None:
    found = []
    for size in (None, 2):
        net = build().double()
        torch.manual_seed(1)
        module = CoCaLit(net, AdamW(lr=0.1), 0, micro_batch_size=size, objectives={"mapped": Mapped()})
        loss = module.training_step(own_batch(net, 0), 0)
        module.zero_grad()  # as Lightning does before the backward pass
        loss.backward()
        found.append({name: p.grad for name, p in module.objectives.named_parameters()})
    assert found[0]["mapped.map.weight"].abs().sum() > 0
    torch.testing.assert_close(found[1], found[0], atol=1e-10, rtol=0)


def trained_on_further_captions(size: int | None) -> dict[str, Tensor]:
    return trained_with(FurtherTexts(), with_further_captions, 1.0, size)


def test_further_captions_on_two_ranks_and_in_micro_batches(on_ranks) -> None:
    expected = trained_on_further_captions(None)
    without = trained_with(Mapped(), with_further_captions, 1.0, None)
    assert (without["text.norm.weight"] - expected["text.norm.weight"]).abs().max() > 1e-4
    on_two_ranks = [*on_ranks(2, trained_on_further_captions, None), *on_ranks(2, trained_on_further_captions, 1)]
    for found in [trained_on_further_captions(2), *on_two_ranks]:
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


VIT = (
    "+model.net.image_encoder=vit_base_patch32_clip_224",
    "+model.net.image_encoder_args={patch_size:8,embed_dim:64,depth:1,num_heads:2}",
)


def test_the_encoder_that_the_refusal_names_works() -> None:
    net = create_model("coca_tiny", image_encoder="vit_tiny_patch16_224")
    module = CoCaLit(net, AdamW(lr=0.1), micro_batch_size=2)
    module.check_norms()
    assert module.training_step(own_batch(net, 0), 0).isfinite()


SHORT = (
    *("experiment=scenes", "trainer=cpu", "trainer.max_epochs=1", "trainer.limit_val_batches=0", "evals=[]", "ema=0.5"),
    *("data.train_count=32", "data.batch_size=8", "model.warmup_steps=2", "trainer.gradient_clip_val=0.5"),
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_in_micro_batches_ends_with_the_same_weights(tmp_path: Path, precision: str) -> None:
    saved = {}
    for size in ("null", "2"):
        folder = tmp_path / size
        overrides = (f"trainer.precision={precision}", f"trainer.micro_batch_size={size}", "model.optimizer.lr=1e-4")
        run(folder, *SHORT, *VIT, *overrides)
        saved[size] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    if precision == "32-true":
        torch.testing.assert_close(saved["2"], saved["null"], atol=2e-6, rtol=0)
    else:  # four steps of 1e-4: where a gradient is next to nothing, rounding decides on its sign, and Adam on a step
        for name, expected in saved["null"].items():
            difference = (saved["2"][name] - expected).abs()
            # Softmax does not notice a bias of keys, so it has no gradient at all.
            if name.endswith("qkv.bias"):
                queries, _, values = difference.chunk(3)
                difference = torch.cat([queries, values])
            elif name.endswith(".kv.bias"):
                _, difference = difference.chunk(2)
            assert difference.mean() < 3e-5, name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("trainer.micro_batch_size=3", *VIT), r"batch_size.*8.*3"),
        (
            ("trainer.micro_batch_size=2",),
            r"resnet10t.*model.freeze=\[image_encoder\].*image_encoder=vit_tiny_patch16_224",
        ),
        (("trainer.micro_batch_size=0", *VIT), r"micro_batch_size.*0"),
    ],
)
def test_wrong_micro_batches_are_refused(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, *SHORT, *overrides)
