"""The policy gradient against hand-worked cases, exhaustive expectation and a single process."""

import torch
import torch.nn.functional as F

from coca_lit.projects.rewards.self_critical import leave_one_out, policy_loss


def test_leave_one_out_by_hand() -> None:
    found = leave_one_out(torch.tensor([[1.0, 2.0, 6.0], [3.0, 3.0, 3.0]]))
    torch.testing.assert_close(found, torch.tensor([[1.0 - 4, 2.0 - 3.5, 6.0 - 1.5], [0.0, 0.0, 0.0]]))


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
