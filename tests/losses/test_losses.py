"""The losses against naive loops, plain formulas and OpenCLIP, on one rank and on several."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from coca_lit.distributed import gather, rank, world_size
from coca_lit.losses import caption_loss, contrastive_loss, loss_terms, siglip_loss
from coca_lit.models import CoCaOutput

CAPTION_LENGTHS = [1, 7, 2, 2, 3, 9, 4, 1, 1, 5, 12, 6]  # predicted tokens of 12 pairs: no two ranks get equally many


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def nll(scores: list[float], target: int) -> float:
    return math.log(sum(math.exp(s) for s in scores)) - scores[target]


@pytest.mark.parametrize("loss", ["contrastive", "siglip"])
def test_gradients_are_computed_only_if_one_is_wanted(loss: str) -> None:
    images, texts, scale = unit(6, 8), unit(6, 8), torch.tensor([3.0])
    losses: dict[str, Callable[[], Tensor]] = {
        "contrastive": lambda: contrastive_loss(images, texts, scale),
        "siglip": lambda: siglip_loss(images, texts, scale, torch.tensor([-1.0])),
    }
    flops = {}
    for wanted, enabled in ((False, True), (True, False), (True, True)):
        images.requires_grad_(wanted)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(enabled):
            losses[loss]()
        flops[wanted, enabled] = counter.get_total_flops()
    assert flops[False, True] == flops[True, False] == 2 * 6 * 6 * 8
    assert flops[True, True] > flops[False, True]


def test_contrastive_loss_equals_a_double_loop() -> None:
    torch.manual_seed(0)
    images, texts, scale = unit(5, 8), unit(5, 8), 6.0
    score = [[scale * float(image @ text) for text in texts] for image in images]
    expected = 0.0
    for i in range(5):
        expected += nll(score[i], i) / 10  # the right text among all texts
        expected += nll([score[j][i] for j in range(5)], i) / 10  # the right image among all images
    assert contrastive_loss(images, texts, torch.tensor([scale])).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("labels", [[], [-100, -100]], ids=["no-states", "all-ignored"])
def test_caption_loss_without_tokens_is_zero_and_can_be_differentiated(labels: list[int]) -> None:
    hidden, vocabulary = torch.randn(len(labels), 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = caption_loss(hidden, vocabulary, torch.tensor(labels, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(vocabulary.grad, torch.zeros(9, 4))


# Tiles and chunks against the plain formulas


def plain_contrastive(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    logits, targets = scale * images @ texts.T, torch.arange(len(images))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def plain_siglip(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(images)) - 1
    return -F.logsigmoid(signs * (scale * images @ texts.T + bias)).sum() / len(images)


def plain_caption(hidden: Tensor, vocabulary: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, vocabulary).float(), labels)


def value_and_gradients(loss: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> list[Tensor]:
    """Of three times the loss, so that the factor of the backward pass counts."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    value = 3 * loss(*leaves, **options)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("tile", [1, 3, 100])
def test_tiles_and_chunks_equal_the_plain_losses(tile: int) -> None:
    torch.manual_seed(0)
    pairs = (unit(7, 8), unit(7, 8), torch.tensor([9.0]))
    states = (torch.randn(7, 8), torch.randn(50, 8), torch.tensor([3, -100, 0, 49, 7, -100, 1]))
    for loss, plain, inputs, options in (
        (contrastive_loss, plain_contrastive, pairs, {"tile": tile}),
        (siglip_loss, plain_siglip, (*pairs, torch.tensor([-4.0])), {"tile": tile}),
        (caption_loss, plain_caption, states, {"chunk": tile}),
    ):
        found, expected = value_and_gradients(loss, *inputs, **options), value_and_gradients(plain, *inputs)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("chunk", [None, 3])
def test_label_smoothing_equals_pytorch(chunk: int | None) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(7, 8), torch.randn(50, 8), torch.tensor([3, -100, 0, 49, 7, -100, 1]))
    hidden, vocabulary, labels = inputs
    terms = loss_terms(CoCaOutput(hidden=hidden, vocabulary=vocabulary, labels=labels))  # without smoothing
    torch.testing.assert_close(terms, {"caption": F.cross_entropy(hidden @ vocabulary.T, labels)})

    def plain(hidden: Tensor, vocabulary: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, vocabulary), labels, label_smoothing=0.2)

    found = value_and_gradients(caption_loss, *inputs, smoothing=0.2, chunk=chunk)
    torch.testing.assert_close(found, value_and_gradients(plain, *inputs), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_weighted_tokens_equal_a_loop(chunk: int | None) -> None:
    torch.manual_seed(0)
    hidden, vocabulary = torch.randn(10, 8, requires_grad=True), torch.randn(7, 8, requires_grad=True)
    labels = torch.tensor([1, 6, 2, 5, 0, 3, 4, -100, 1, 2])
    weights = torch.tensor([0.5, 0.5, 0.5, -0.5, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0])
    found = caption_loss(hidden, vocabulary, labels, torch.tensor(4), chunk, weights=weights)
    gradients = torch.autograd.grad(3 * found, (hidden, vocabulary))
    expected = torch.zeros(())
    for state, label, weight in zip(hidden, labels.tolist(), weights.tolist(), strict=True):
        if label >= 0:
            expected = expected - weight * (state @ vocabulary.T).log_softmax(0)[label] / 4
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(3 * expected, (hidden, vocabulary)))


def test_siglip_loss_equals_open_clip() -> None:
    torch.manual_seed(0)
    inputs = (unit(6, 8), unit(6, 8), torch.tensor([10.0]), torch.tensor([-10.0]))
    expected = value_and_gradients(SigLipLoss(), *inputs)
    torch.testing.assert_close(value_and_gradients(siglip_loss, *inputs), expected, atol=1e-6, rtol=1e-6)


def test_caption_loss_under_autocast_is_as_exact_as_the_plain_one() -> None:
    """Both multiply in bf16; the sum of the weight's gradient over chunks stays in fp32."""
    torch.manual_seed(0)
    hidden, vocabulary, labels = torch.randn(64, 32), torch.randn(50, 32), torch.randint(0, 50, (64,))
    exact = value_and_gradients(plain_caption, hidden, vocabulary, labels)
    with torch.autocast("cpu", torch.bfloat16):
        plain = value_and_gradients(plain_caption, hidden, vocabulary, labels)
        found = value_and_gradients(caption_loss, hidden, vocabulary, labels, chunk=7)
    torch.testing.assert_close(found[0], plain[0], atol=0, rtol=1e-6)
    for ours, theirs, truth in zip(found[1:], plain[1:], exact[1:], strict=True):
        assert ours.dtype == torch.float32
        assert (ours - truth).norm() <= 1.1 * (theirs - truth).norm()


def test_no_gradient_is_formed_where_none_is_wanted() -> None:
    pairs = (unit(4, 8), unit(4, 8), torch.ones(1))
    states = (torch.randn(4, 8), torch.randn(9, 8).requires_grad_(), torch.tensor([1, 2, 3, 4]))
    assert not contrastive_loss(*pairs).requires_grad
    assert not siglip_loss(*pairs, torch.zeros(1)).requires_grad
    with torch.no_grad():
        assert not caption_loss(*states).requires_grad
    caption_loss(*states).backward()
    assert states[0].grad is None
    assert states[1].grad is not None


# Several ranks. Every loss is written in three ways: tiled, the formula on all pairs on every rank ("global"), and own
# rows against all columns ("local rows"); the latter two with nothing of the loss but `gather`.


def local_rows(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    targets = torch.arange(len(images)) + rank() * len(images)
    towards_texts = F.cross_entropy(scale * images @ gather(texts).T, targets)
    return (towards_texts + F.cross_entropy(scale * texts @ gather(images).T, targets)) / 2


CONTRASTIVE: dict[str, Callable[..., Tensor]] = {
    "tiled": lambda i, t, s, b: contrastive_loss(i, t, s, tile=2),
    "global": lambda i, t, s, b: plain_contrastive(gather(i), gather(t), s),
    "local rows": lambda i, t, s, b: local_rows(i, t, s),
    "siglip": lambda i, t, s, b: siglip_loss(i, t, s, b, tile=2),
    "global siglip": lambda i, t, s, b: plain_siglip(gather(i), gather(t), s, b),
}


class Toy(nn.Module):
    """Projections of given inputs: every parameter is shared by all samples, as in the real model."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, 5), nn.Linear(6, 5)
        self.scale, self.bias = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([-3.0]))
        self.decoder, self.vocabulary = nn.Linear(6, 7), nn.Linear(7, 13, bias=False)

    def forward(self, form: str, images: Tensor, texts: Tensor, states: Tensor, labels: Tensor) -> list[Tensor]:
        features = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        return [
            CONTRASTIVE[form](*features, self.scale.exp(), self.bias),
            caption_loss(self.decoder(states), self.vocabulary.weight, labels, chunk=3),
        ]


def toy_step(form: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and gradients of this rank's part of 12 pairs, both averaged over ranks as DDP and the logger do."""
    torch.manual_seed(0)
    toy, count = Toy(), len(CAPTION_LENGTHS)
    images, texts = torch.randn(count, 6), torch.randn(count, 6)
    states = torch.randn(sum(CAPTION_LENGTHS), 6).split(CAPTION_LENGTHS)
    labels = torch.randint(0, 13, (sum(CAPTION_LENGTHS),)).split(CAPTION_LENGTHS)

    share = count // world_size()
    own = slice(rank() * share, (rank() + 1) * share)
    losses = torch.stack(toy(form, images[own], texts[own], torch.cat(states[own]), torch.cat(labels[own])))
    losses.sum().backward()
    gradients = {name: p.grad for name, p in toy.named_parameters() if p.grad is not None}
    results = [losses.detach(), *gradients.values()]
    if world_size() > 1:
        for tensor in results:
            dist.all_reduce(tensor)
            tensor /= world_size()
    return results[0], dict(zip(gradients, results[1:], strict=True))


@pytest.mark.parametrize(
    ("form", "truth"),
    [("tiled", "global"), ("global", "global"), ("local rows", "global"), ("siglip", "global siglip")],
)
def test_losses_on_several_ranks_equal_one_process_with_the_global_batch(on_ranks, form: str, truth: str) -> None:
    losses, gradients = toy_step(truth)
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for results in [[toy_step(form)], on_ranks(2, toy_step, form), on_ranks(3, toy_step, form)]:
        for rank_losses, rank_gradients in results:
            torch.testing.assert_close(rank_losses, losses, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(rank_gradients, gradients, atol=1e-6, rtol=0)
