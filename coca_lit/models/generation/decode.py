"""Captions written from left to right, one choice per token: the likeliest (greedy) or a drawn one (sampling); and the
constraints on that token, for every strategy.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from coca_lit.models.generation.state import UNFORCED, Decoding, Hypotheses, Prompts, look
from coca_lit.models.packing import to_device

Choice = Callable[[Tensor], Tensor]  # scores (R, V) -> ids (R,)
NEVER = float("-inf")


# Constraints and filters take and return scores (R, V), logits or log-probabilities, and change nothing in place.


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

    Negative scores are multiplied by the penalty, positive ones divided by it. They are logits, and of beams
    log-probabilities, as in Transformers.
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


def greedy(scores: Tensor) -> Tensor:
    return scores.argmax(dim=-1)


@dataclass(frozen=True)
class Sampling:
    """Draws from softmax(scores / temperature), cut to the `top_k` likeliest tokens, then to the `top_p` nucleus."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __call__(self, scores: Tensor) -> Tensor:
        probabilities = self.filter(scores).softmax(dim=-1)
        if not scores.is_cuda:
            return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]
        # The same draw, as an exponential race; `multinomial` checks its input, for which a GPU has to finish its work.
        return (probabilities / torch.empty_like(probabilities).exponential_(generator=self.generator)).argmax(dim=-1)

    def filter(self, scores: Tensor) -> Tensor:
        scores = scores / self.temperature
        if self.top_k is not None:
            scores = keep_top_k(scores, self.top_k)
        if self.top_p is not None:
            scores = keep_top_p(scores, self.top_p)
        return scores


def decode(
    decoding: Decoding, prompts: Prompts, constraints: Constraints, choose: Choice, count: int, pad_id: int
) -> Hypotheses:
    """`count` captions for each image in the order of drawing; their score is the mean log-probability of the chosen
    tokens.

    An image leaves the batch when all of its captions have ended. A caption of the maximal length still ends with the
    end id.
    """
    start = prompts.shortest
    end_id = constraints.end_id
    forced = prompts.ids.repeat_interleave(count, dim=0)  # (R, L)
    rows, length = forced.shape
    ids = torch.full_like(forced, pad_id)
    ids[:, :start] = forced[:, :start]
    log_probs = torch.zeros(rows, device=ids.device)
    active = torch.arange(rows, device=ids.device)  # rows whose image is still in the batch
    unfinished = torch.ones_like(active, dtype=torch.bool)  # which of those have not ended

    logits = decoding.begin(ids[::count, :start], count)
    for position in range(start, length):
        model_scores = logits.log_softmax(dim=-1)  # (R, V)
        scores = constraints(logits, ids[active, :position])  # beams add log-probabilities, and penalise these
        chosen = choose(scores) if position < length - 1 else torch.full_like(active, end_id)
        forced_here = forced[active, position]
        free = (forced_here == UNFORCED) & unfinished
        chosen = torch.where(forced_here == UNFORCED, chosen, forced_here).where(unfinished, pad_id)
        ids[active, position] = chosen
        log_probs[active] += model_scores.gather(1, chosen[:, None])[:, 0].where(free, 0)

        unfinished = unfinished & (chosen != end_id)
        if position == length - 1:
            break
        going_on = look(unfinished.view(-1, count).any(dim=1), position)  # images
        if going_on is not None and not going_on.any():
            break
        if going_on is not None and not going_on.all():
            images = to_device(going_on.nonzero()[:, 0], ids.device)
            kept = to_device(going_on.repeat_interleave(count).nonzero()[:, 0], ids.device)
            decoding.select(kept, images)
            active = active[kept]
            unfinished = unfinished[kept]
            chosen = chosen[kept]
        logits = decoding.step(chosen[:, None])

    written = caption_lengths(ids, end_id) - prompts.lengths.repeat_interleave(count)
    shape = (len(prompts.ids), count)
    return Hypotheses(ids.view(*shape, length), (log_probs / written).view(shape), log_probs.view(shape))


def caption_lengths(ids: Tensor, end_id: int) -> Tensor:
    """Tokens of captions (…, L) up to the end id, start and end included; L if there is no end."""
    ends = ids == end_id
    return torch.where(ends.any(dim=-1), ends.int().argmax(dim=-1) + 1, ids.shape[-1])
