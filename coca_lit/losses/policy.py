"""The policy gradient of self-critical training: samples that score above the other samples of an image become
likelier.

For a caption y drawn from the model, ∇ E[r(y)] = E[(r(y) - b) ∇ log p(y)] for any b that does not depend on y
(REINFORCE, Williams 1992). b is the mean reward of the image's other samples: it needs no greedy caption, and its
variance is smaller (Luo 2020, arXiv 2003.09971).
"""

import torch
from torch import Tensor

from coca_lit.distributed import sum_over_ranks
from coca_lit.losses.caption import caption_loss


def leave_one_out(rewards: Tensor) -> Tensor:
    """Rewards (B, K) minus the mean of the other K - 1 samples of the same image: (B, K), rows add up to 0."""
    samples = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * (samples / (samples - 1))


def policy_loss(hidden: Tensor, vocabulary: Tensor, labels: Tensor, lengths: Tensor, advantages: Tensor) -> Tensor:
    """-Σ advantage · log p(caption), averaged over all sampled captions of the global batch.

    Args:
        hidden, vocabulary, labels: of the sampled captions, one after the other, as `caption_loss` takes them.
        lengths: (R,) rows of `hidden` that belong to each caption.
        advantages: (R,) reward minus baseline.

    Returns:
        A scalar whose mean over ranks is the mean over the global batch. Its gradient is -∇ E[reward]; its value means
        nothing.
    """
    count = sum_over_ranks(torch.full((), len(advantages), device=advantages.device))
    weights = advantages.repeat_interleave(lengths)  # (N,)
    return caption_loss(hidden, vocabulary, labels, count, weights=weights)
