"""Constraints on the next token for every strategy, and the filters of sampling.

All functions take and return scores (R, V), logits or log-probabilities, and change nothing in place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = float("-inf")


@dataclass(frozen=True)
class Constraints:
    """Rules for the token after ids (R, t).

    Args:
        end_id: the id that ends a caption.
        min_length: the end is forbidden while a caption has fewer tokens, start included.
        repetition_penalty: see `penalize_repetition`; 1 is none.
        no_repeat_ngram: no run of that many tokens may occur twice; 0 allows all.
    """

    end_id: int
    min_length: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0

    def __call__(self, scores: Tensor, ids: Tensor) -> Tensor:
        if self.repetition_penalty != 1:
            scores = penalize_repetition(scores, ids, self.repetition_penalty)
        if self.no_repeat_ngram:
            scores = forbid_repeated_ngrams(scores, ids, self.no_repeat_ngram)
        if ids.shape[1] < self.min_length:
            scores = scores.masked_fill(_is(scores, self.end_id), NEVER)
        return scores


def penalize_repetition(scores: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Makes tokens that occur in ids less likely (CTRL, arXiv 1909.05858).

    Negative scores are multiplied by the penalty, positive ones divided by it.
    """
    seen = scores.gather(1, ids)  # (R, t)
    return scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def forbid_repeated_ngrams(scores: Tensor, ids: Tensor, n: int) -> Tensor:
    """Forbids tokens that would complete a run of n tokens that ids (R, t) already contain."""
    if ids.shape[1] < n:
        return scores
    runs = ids.unfold(1, n, 1)  # (R, t - n + 1, n)
    tail = ids[:, ids.shape[1] - n + 1 :]  # (R, n - 1)
    again = (runs[:, :, :-1] == tail[:, None]).all(dim=-1)  # (R, t - n + 1)
    allowed = torch.where(again, NEVER, float("inf")).to(scores.dtype)
    return scores.scatter_reduce(1, runs[:, :, -1], allowed, "amin")


def force_token(scores: Tensor, token: int) -> Tensor:
    """Forbids everything but one token."""
    return scores.masked_fill(~_is(scores, token), NEVER)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Forbids all but the k likeliest tokens; ties with the last of them stay."""
    least = scores.topk(min(k, scores.shape[1])).values[:, -1:]
    return scores.masked_fill(scores < least, NEVER)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Forbids all but the fewest likeliest tokens whose probabilities sum to p (nucleus, arXiv 1904.09751)."""
    ordered, order = scores.sort(descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # sum over the likelier tokens
    drop = before >= p
    drop[:, 0] = False
    return scores.masked_fill(drop.scatter(1, order, drop), NEVER)


def _is(scores: Tensor, token: int) -> Tensor:
    return torch.arange(scores.shape[1], device=scores.device) == token
