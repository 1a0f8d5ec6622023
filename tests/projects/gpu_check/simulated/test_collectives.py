"""What two ranks tell each other, on a simulated NCCL."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from simulated_gpu import SimulatedGpu
from two_ranks import GPU, answer_as_two_ranks, features

from coca_lit import distributed
from coca_lit.callbacks import NonFiniteGuard, SamplesSeen
from coca_lit.data.batch import Batch
from coca_lit.losses import caption_loss, contrastive_loss, siglip_loss


@pytest.fixture(autouse=True)
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    answer_as_two_ranks(monkeypatch)
    with SimulatedGpu():
        yield


def test_samples_are_counted_before_the_first_batch_and_after_it() -> None:
    """Also by a finished run that is scored again: there is no batch from which to take the device."""
    seen = SamplesSeen()
    assert seen.total() == {"samples": 0, "tokens": 0}
    batch = Batch(
        torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        torch.zeros(2, 4, dtype=torch.long),
        torch.tensor([3, 4]),
        ["a", "b"],
    )
    seen.on_train_batch_end(None, None, None, batch.to(GPU), 0)
    assert seen.total() == {"samples": 4, "tokens": 14}


def test_numbers_of_the_host_travel_on_the_device() -> None:
    assert distributed.max_over_ranks([1, 2.5]) == [1, 2.5]
    assert distributed.totals_over_ranks([2**40, 3]) == [2**41, 6]


def test_flags_are_known_a_step_later() -> None:
    exchange, heard = distributed.StepExchange(), []
    for flag in (0, 15, 0, 0):
        exchange.tell([flag, 0])
        exchange.exchange(torch.ones(2).to(GPU))
        heard.append(exchange.heard())
    assert heard == [[], [0, 0], [15, 0], [0, 0]]


def test_losses() -> None:
    scale = torch.ones(1).to(GPU).requires_grad_()
    hidden, vocabulary, labels = features(6, 8), features(11, 8), torch.arange(6).to(GPU)
    weights = torch.tensor([0.5, 0.5, -0.5, -0.5, -0.5, -0.5]).to(GPU)
    count = distributed.sum_over_ranks(torch.full((), 2, device=GPU))
    terms = [
        contrastive_loss(features(4, 8), features(4, 8), scale),
        siglip_loss(features(4, 8), features(4, 8), scale, torch.zeros(1).to(GPU).requires_grad_()),
        caption_loss(hidden, vocabulary, labels),
        caption_loss(features(12, 8), features(11, 8), torch.arange(12).to(GPU) % 11, chunk=5),
        caption_loss(hidden, vocabulary, labels, count, weights=weights),
    ]
    torch.stack(terms).sum().backward()
    assert all(term.isfinite() for term in terms)


def test_the_guard(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coca_lit.callbacks.guards.gather_objects", lambda x: [x, x])
    parameter = torch.nn.Parameter(torch.ones(3).to(GPU))
    optimizer = torch.optim.AdamW([parameter], fused=True, lr=0.1)
    guard, trainer = NonFiniteGuard(tmp_path), SimpleNamespace(precision="32-true", accumulate_grad_batches=1)
    for number in (1.0, float("nan"), 2.0):
        parameter.grad = torch.full((3,), number).to(GPU)
        before = parameter.detach().cpu()
        guard.on_before_backward(trainer, None, torch.ones(()).to(GPU))
        guard.on_before_optimizer_step(trainer, None, optimizer)
        optimizer.step()
        assert torch.equal(parameter.detach().cpu(), before) == (number != number)
