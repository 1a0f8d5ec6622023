"""Beam search, all images at once, with log-probabilities or with OpenCLIP's rule.

OpenCLIP 3's beams add raw logits, which rank captions differently unless the log-normaliser happens to be constant; its
"6 beams in 3 groups" write the same captions as 2 beams, because nothing makes the groups differ.
`scoring="openclip_legacy"` reproduces it. OpenCLIP 4 uses the search of Transformers, with 6 beams unless told
otherwise: `scoring="openclip"` adds log-probabilities, and a caption of the maximal length stays open.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from coca_lit.models.generation.decode import NEVER, Constraints, force_token
from coca_lit.models.generation.options import Scoring
from coca_lit.models.generation.state import UNFORCED, Decoding, Hypotheses, Prompts, look
from coca_lit.models.packing import to_device


class Candidates(NamedTuple):
    """The 2K best extensions of the K open captions of each image, best first; every part is (B, 2K)."""

    source: Tensor  # the open caption that is extended
    tokens: Tensor  # by this token
    scores: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class BeamSearch:
    """Finds the `num_beams` best captions of every image.

    A closed caption scores sum / length ** length_penalty. With log-probabilities the length counts chosen tokens, the
    end included, and a caption of the maximal length is closed by the end id. OpenCLIP's rule sums logits, its length
    counts the start too, and a caption of the maximal length has no end.

    An image is done, and leaves the batch, when it has `num_beams` closed captions, the worst of which scores at least
    as high as the best candidate would if it ended now; by Transformers' rule, the best that does not end.
    """

    num_beams: int
    length_penalty: float
    scoring: Scoring
    constraints: Constraints
    pad_id: int

    def search(self, decoding: Decoding, prompts: Prompts) -> Hypotheses:
        """Captions (B, K, L), best first; scores are -inf where there are fewer than K possible ones."""
        start, (count, length) = prompts.shortest, prompts.ids.shape
        result, opened, closed = (self._nothing(prompts) for _ in range(3))
        opened.ids[:, :, :start] = prompts.ids[:, None, :start]  # the prompt is the only open caption
        opened.scores[:, 0] = opened.log_probs[:, 0] = 0
        active = torch.arange(count, device=prompts.ids.device)  # images in the batch
        done = torch.zeros_like(active, dtype=torch.bool)  # which of them are done
        logits = decoding.begin(prompts.ids[:, :start], self.num_beams)
        for position in range(start, length):
            active_prompts = Prompts(prompts.ids[active], prompts.lengths[active], start)
            candidates = self._candidates(opened, logits, active_prompts, position)
            more, now_done = self._close(opened, closed, candidates, active_prompts, position)
            closed = _unless(done, closed, more)
            done = done | now_done
            opened, source = self._extend(opened, candidates, position)
            if position == length - 1:
                break
            rows = source + torch.arange(len(source), device=source.device)[:, None] * self.num_beams  # (B, K)
            going_on = look(~done, position)  # images
            if going_on is None or going_on.all():
                # On a CPU a comparison takes less time than the caches; a GPU would have to wait for it.
                if not rows.is_cpu or not torch.equal(rows.flatten(), torch.arange(rows.numel(), device=rows.device)):
                    decoding.select(rows.flatten())
            else:
                gone, kept = (to_device(part.nonzero()[:, 0], rows.device) for part in (~going_on, going_on))
                _put(result, active[gone], _rows(closed, gone))
                if len(kept) == 0:
                    return result
                decoding.select(rows[kept].flatten(), kept)
                active = active[kept]
                done = done[kept]
                opened = _rows(opened, kept)
                closed = _rows(closed, kept)
            logits = decoding.step(opened.ids[:, :, position].reshape(-1, 1))
        if self.scoring != "log_prob":
            counted = length if self.scoring == "openclip_legacy" else (length - prompts.lengths[active])[:, None]
            still = (opened.scores / counted**self.length_penalty).masked_fill(done[:, None], NEVER)
            closed = _best(closed, opened._replace(scores=still))
        _put(result, active, closed)
        return result

    def _nothing(self, prompts: Prompts) -> Hypotheses:
        """No captions yet: scores of -inf."""
        ids = torch.full_like(prompts.ids, self.pad_id)[:, None].repeat(1, self.num_beams, 1)  # (B, K, L)
        nothing = torch.full(ids.shape[:2], NEVER, device=ids.device)
        return Hypotheses(ids, nothing, nothing.clone())

    def _candidates(self, opened: Hypotheses, logits: Tensor, prompts: Prompts, position: int) -> Candidates:
        log_probs = logits.log_softmax(dim=-1)  # (B · K, V)
        legacy = self.scoring == "openclip_legacy"
        scores = self.constraints(logits if legacy else log_probs, opened.ids.flatten(0, 1)[:, :position])
        if position == opened.ids.shape[2] - 1 and self.scoring == "log_prob":
            scores = force_token(scores, self.constraints.end_id)
        # The best 2K of each caption first, then the best 2K of an image among these: no sort over K · V.
        best, tokens = scores.topk(min(2 * self.num_beams, scores.shape[1]))  # (B · K, C)
        chosen = log_probs.gather(1, tokens)
        of_image = (len(opened.ids), self.num_beams * tokens.shape[1])
        choices = tokens.shape[1]
        tokens = tokens.view(of_image)  # (B, K · C)
        sums = (opened.scores.view(-1, 1) + best).view(of_image)
        likelihoods = (opened.log_probs.view(-1, 1) + chosen).view(of_image)
        sums, which = sums.topk(2 * self.num_beams)  # (B, 2K)
        # Where a prompt forces a token, all open captions take it, in order and at no cost.
        forced = prompts.ids[:, position, None]  # (B, 1)
        free = forced == UNFORCED
        order = torch.arange(2 * self.num_beams, device=forced.device) % self.num_beams
        return Candidates(
            (which // choices).where(free, order),
            tokens.gather(1, which).where(free, forced),
            sums.where(free, opened.scores[:, order]),
            likelihoods.gather(1, which).where(free, opened.log_probs[:, order]),
        )

    def _close(
        self, opened: Hypotheses, closed: Hypotheses, candidates: Candidates, prompts: Prompts, position: int
    ) -> tuple[Hypotheses, Tensor]:
        """Adds the candidates that end to the closed captions, and returns which images (B,) are done.

        Only an end among the best K candidates counts: worse ones would win just by being short.
        """
        counted = torch.full_like(prompts.lengths, position + 1)  # (B,)
        if self.scoring != "openclip_legacy":
            counted = (counted - prompts.lengths).clamp(min=1)  # no caption ends in a prompt: any divisor will do
        scores = candidates.scores / counted[:, None] ** self.length_penalty  # (B, 2K)
        best = Candidates(*(part[:, : self.num_beams] for part in candidates))
        ids = _at(opened.ids, best.source)
        ids[:, :, position] = best.tokens
        ends = best.tokens == self.constraints.end_id
        ids = ids.masked_fill(~ends[:, :, None], self.pad_id)  # no caption, should there be too few of them
        ended = Hypotheses(ids, scores[:, : self.num_beams].where(ends, NEVER), best.log_probs)
        closed = _best(closed, ended)
        worst = closed.scores[:, -1]
        if self.scoring == "openclip":
            going_on = candidates.tokens != self.constraints.end_id
            scores = scores.where(going_on, NEVER).amax(dim=1, keepdim=True)
        return closed, (worst > NEVER) & (worst >= scores[:, 0])

    def _extend(self, opened: Hypotheses, candidates: Candidates, position: int) -> tuple[Hypotheses, Tensor]:
        """The best K candidates that do not end, and which open captions (B, K) they continue."""
        ends = candidates.tokens == self.constraints.end_id
        first = ends.int().argsort(dim=1, stable=True)[:, : self.num_beams]
        source, tokens, scores, log_probs = (part.gather(1, first) for part in candidates)
        ids = _at(opened.ids, source)
        ids[:, :, position] = tokens
        return Hypotheses(ids, scores, log_probs), source


def _best(some: Hypotheses, others: Hypotheses) -> Hypotheses:
    """The K best of two sets of K captions for each image."""
    ids, scores, log_probs = (torch.cat(pair, dim=1) for pair in zip(some, others, strict=True))
    scores, which = scores.topk(some.scores.shape[1])
    return Hypotheses(_at(ids, which), scores, log_probs.gather(1, which))


def _unless(done: Tensor, before: Hypotheses, after: Hypotheses) -> Hypotheses:
    """The captions `before` of images that are done (B,), those `after` of all others."""
    ids, scores, log_probs = zip(before, after, strict=True)
    kept = done[:, None]
    return Hypotheses(torch.where(kept[:, :, None], *ids), torch.where(kept, *scores), torch.where(kept, *log_probs))


def _at(ids: Tensor, which: Tensor) -> Tensor:
    """Rows `which` (B, K) of ids (B, N, L), image by image -> (B, K, L)."""
    return ids.gather(1, which[:, :, None].expand(-1, -1, ids.shape[2]))


def _rows(captions: Hypotheses, images: Tensor) -> Hypotheses:
    return Hypotheses(*(part[images] for part in captions))


def _put(result: Hypotheses, images: Tensor, captions: Hypotheses) -> None:
    """Writes the captions of some images where they belong."""
    for target, part in zip(result, captions, strict=True):
        target[images] = part
