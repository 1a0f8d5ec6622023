"""The policy loss on two ranks of a simulated NCCL."""

from collections.abc import Iterator

import pytest
import torch
from simulated_gpu import SimulatedGpu
from two_ranks import GPU, answer_as_two_ranks, features

from coca_lit.projects.rewards.self_critical import policy_loss


@pytest.fixture(autouse=True)
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    answer_as_two_ranks(monkeypatch)
    with SimulatedGpu():
        yield


def test_policy_loss() -> None:
    hidden, vocabulary = features(6, 8), features(11, 8)
    labels = torch.arange(6).to(GPU)
    loss = policy_loss(hidden, vocabulary, labels, torch.tensor([2, 4]).to(GPU), torch.tensor([0.5, -0.5]).to(GPU))
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
