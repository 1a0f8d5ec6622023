"""The policy gradient against hand-worked cases, exhaustive expectation and a single process."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coca_lit.projects.rewards.self_critical import leave_one_out, policy_loss

LENGTHS = torch.tensor([3, 1, 2, 4])  # tokens of four captions


def states() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.tensor([1, 6, 2, 5, 0, 3, 4, -100, 1, 2])
    return torch.randn(10, 8), torch.randn(7, 8), labels


def test_leave_one_out_by_hand() -> None:
    found = leave_one_out(torch.tensor([[1.0, 2.0, 6.0], [3.0, 3.0, 3.0]]))
    torch.testing.assert_close(found, torch.tensor([[1.0 - 4, 2.0 - 3.5, 6.0 - 1.5], [0.0, 0.0, 0.0]]))


def test_policy_loss_of_two_captions_by_hand() -> None:
    """Two words of equal probability, two captions of one word: the gradient by the logits is (p - onehot) · A / 2."""
    hidden = torch.eye(2, requires_grad=True)
    loss = policy_loss(hidden, torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([1, 1]), torch.tensor([3.0, -3.0]))
    assert loss.item() == pytest.approx((3 * math.log(2) - 3 * math.log(2)) / 2)
    weight = torch.zeros(2, 2, requires_grad=True)  # logits of state i are row i of its transpose
    lengths, advantages = torch.tensor([1, 1]), torch.tensor([3.0, -3.0])
    policy_loss(torch.eye(2), weight, torch.tensor([0, 1]), lengths, advantages).backward()
    torch.testing.assert_close(weight.grad.T, torch.tensor([[-0.5 * 3, 0.5 * 3], [-0.5 * 3, 0.5 * 3]]) / 2)


def test_gradient_is_that_of_the_expected_reward() -> None:
    """All pairs of one-word captions, each as probable as it is: the mean policy gradient is -∇ Σ p r, exactly."""
    torch.manual_seed(0)
    state, vocabulary = torch.randn(1, 8), torch.randn(5, 8, requires_grad=True)
    rewards = torch.tensor([0.0, 1.0, 4.0, 2.0, 0.5])
    p = F.linear(state, vocabulary)[0].softmax(0)
    expected = torch.autograd.grad(-(p * rewards).sum(), vocabulary, retain_graph=True)[0]
    total = torch.zeros_like(vocabulary)
    for a in range(5):
        for b in range(5):
            pair = torch.tensor([a, b])
            advantages = leave_one_out(rewards[pair][None]).flatten()
            loss = policy_loss(state.expand(2, -1), vocabulary, pair, torch.tensor([1, 1]), advantages)
            total += (p[a] * p[b]).detach() * torch.autograd.grad(loss, vocabulary)[0]
    torch.testing.assert_close(total, expected, atol=1e-6, rtol=1e-5)
