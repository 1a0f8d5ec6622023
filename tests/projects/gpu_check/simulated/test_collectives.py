"""Two ranks that hold the same, on a simulated NCCL, which refuses tensors of the host."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from simulated_gpu import DeviceTensor, SimulatedGpu
from torch import Tensor
from torch.nn.functional import normalize

from coca_lit import distributed
from coca_lit.callbacks import NonFiniteGuard, SamplesSeen
from coca_lit.data.batch import Batch
from coca_lit.losses import caption_loss, contrastive_loss, siglip_loss
from coca_lit.training.self_critical import policy_loss

GPU = torch.device("cuda", 0)


def check(*tensors: Tensor) -> None:
    for x in tensors:
        if not isinstance(x, DeviceTensor):
            raise RuntimeError("No backend type associated with device type cpu")


def all_reduce(x: Tensor, op: Any = dist.ReduceOp.SUM, **_: Any) -> None:
    check(x)
    if op == dist.ReduceOp.SUM:
        x.mul_(2)


def all_gather(out: Tensor, x: Tensor, **_: Any) -> SimpleNamespace:
    check(out, x)
    out.copy_(torch.cat([x, x]).view_as(out))
    return SimpleNamespace(wait=lambda: None)


def reduce_scatter(out: Tensor, x: Tensor, **_: Any) -> None:
    check(out, x)
    out.copy_(2 * x[: len(out)])


@pytest.fixture(autouse=True)
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    answers: dict[str, Any] = {"is_initialized": True, "get_world_size": 2, "get_rank": 0, "get_backend": "nccl"}
    for name, answer in answers.items():
        monkeypatch.setattr(dist, name, lambda *_, _answer=answer: _answer)
    collectives = {
        "all_reduce": all_reduce,
        "all_gather_into_tensor": all_gather,
        "reduce_scatter_tensor": reduce_scatter,
        "all_gather_single": all_gather,  # their names from PyTorch 2.13 on
        "reduce_scatter_single": reduce_scatter,
    }
    for name, function in collectives.items():
        monkeypatch.setattr(dist, name, function, raising=False)
    for name in ("all_gather", "reduce_scatter", "broadcast", "all_gather_object", "broadcast_object_list"):
        monkeypatch.setattr(dist, name, None)  # not to be called
    with SimulatedGpu():
        yield


def features(*shape: int) -> Tensor:
    return normalize(torch.randn(*shape), dim=-1).to(GPU).requires_grad_()


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
    terms = [
        contrastive_loss(features(4, 8), features(4, 8), scale),
        siglip_loss(features(4, 8), features(4, 8), scale, torch.zeros(1).to(GPU).requires_grad_()),
        caption_loss(hidden, vocabulary, labels),
        caption_loss(features(12, 8), features(11, 8), torch.arange(12).to(GPU) % 11, chunk=5),
        policy_loss(hidden, vocabulary, labels, torch.tensor([2, 4]).to(GPU), torch.tensor([0.5, -0.5]).to(GPU)),
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
