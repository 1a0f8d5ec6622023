"""Captions written from left to right, one choice per token: the likeliest (greedy) or a drawn one (sampling)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from coca_lit.models.generation.constraints import Constraints, keep_top_k, keep_top_p
from coca_lit.models.generation.state import UNFORCED, Decoding, Hypotheses, Prompts, look
from coca_lit.models.packing import to_device

Choice = Callable[[Tensor], Tensor]  # scores (R, V) -> ids (R,)


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
    start, end_id = prompts.shortest, constraints.end_id
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
        scores = constraints(model_scores, ids[active, :position])
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
            active, unfinished, chosen = active[kept], unfinished[kept], chosen[kept]
        logits = decoding.step(chosen[:, None])

    written = caption_lengths(ids, end_id) - prompts.lengths.repeat_interleave(count)
    shape = (len(prompts.ids), count)
    return Hypotheses(ids.view(*shape, length), (log_probs / written).view(shape), log_probs.view(shape))


def caption_lengths(ids: Tensor, end_id: int) -> Tensor:
    """Tokens of captions (…, L) up to the end id, start and end included; L if there is no end."""
    ends = ids == end_id
    return torch.where(ends.any(dim=-1), ends.int().argmax(dim=-1) + 1, ids.shape[-1])
