"""The strategies written the slow way, one caption at a time without any cache, to compare with."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from coca_lit.models import CoCa


@torch.no_grad()
def image_tokens(model: CoCa, image: Tensor) -> Tensor:
    """image (3, H, W) -> what the decoder sees of it (1, S, E)."""
    return model.pooling(model.image_encoder(image[None]), contrastive=False)[1]


def state_at_end(model: CoCa, images: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """(B, D), the decoder's state at the last token of each text (B, L)."""
    states, layout = model.multimodal_states(images, tokens, lengths)
    return layout.gather_at(states, lengths - 1)


@torch.no_grad()
def next_logits(model: CoCa, seen: Tensor, ids: Sequence[int]) -> Tensor:
    """Logits (V,) after a beginning, from one pass over all of it; `seen` are image tokens (1, S, E)."""
    states, _, _ = model.text(torch.tensor([ids]), torch.tensor([len(ids)]), contrastive=False)
    return model.decoder.vocabulary(model.decoder(states[:, : len(ids)], seen))[0, -1]


def next_scores(model: CoCa, seen: Tensor, ids: Sequence[int]) -> Tensor:
    """Log-probabilities (V,) in place of the logits."""
    return next_logits(model, seen, ids).log_softmax(-1)


def constrain(
    scores: Tensor, ids: Sequence[int], end: int, last: bool, least: int = 0, penalty: float = 1.0, ngram: int = 0
) -> list[float]:
    values = scores.tolist()
    for token in set(ids) if penalty != 1 else ():
        values[token] = values[token] * penalty if values[token] < 0 else values[token] / penalty
    seen = {tuple(ids[i : i + ngram]) for i in range(len(ids) - ngram + 1)} if ngram else set()
    for token in range(len(values)):
        repeats = ngram and (*ids[len(ids) - ngram + 1 :], token) in seen
        if repeats or (token == end and len(ids) < least) or (last and token != end):
            values[token] = -math.inf
    return values


def greedy(model: CoCa, image: Tensor, start: Sequence[int], length: int, **rules: float) -> list[int]:
    ids, end, seen = list(start), model.tokenizer.eot_id, image_tokens(model, image)
    while len(ids) < length and ids[-1] != end:
        values = constrain(next_logits(model, seen, ids), ids, end, len(ids) == length - 1, **rules)
        ids.append(max(range(len(values)), key=values.__getitem__))
    return ids


def beams(
    model: CoCa, image: Tensor, start: Sequence[int], length: int, width: int, exponent: float = 1.0, **rules: float
) -> list[tuple[float, list[int]]]:
    """Closed captions with their scores, best first: plain lists, sorted whole."""
    end, seen = model.tokenizer.eot_id, image_tokens(model, image)
    opened, closed = [(0.0, list(start))], []
    for position in range(len(start), length):
        found = []
        for total, ids in opened:
            values = constrain(next_scores(model, seen, ids), ids, end, position == length - 1, **rules)
            found += [(total + value, [*ids, token]) for token, value in enumerate(values)]
        found = [pair for pair in sorted(found, key=lambda pair: -pair[0]) if pair[0] > -math.inf][: 2 * width]
        count = (position + 1 - len(start)) ** exponent
        closed += [(total / count, ids) for total, ids in found[:width] if ids[-1] == end]
        closed = sorted(closed, key=lambda pair: -pair[0])[:width]
        opened = [pair for pair in found if pair[1][-1] != end][:width]
        if not opened or (len(closed) == width and closed[-1][0] >= found[0][0] / count):
            break
    return closed


def all_captions(model: CoCa, image: Tensor, start: Sequence[int], length: int) -> list[tuple[float, list[int]]]:
    """Every possible caption of at most `length` tokens with its mean log-probability, best first."""
    end, seen = model.tokenizer.eot_id, image_tokens(model, image)
    opened, closed = [(0.0, list(start))], []
    while opened:
        total, ids = opened.pop()
        for token, value in enumerate(next_scores(model, seen, ids).tolist()):
            if token == end:
                closed.append(((total + value) / (len(ids) + 1 - len(start)), [*ids, end]))
            elif len(ids) < length - 1:
                opened.append((total + value, [*ids, token]))
    return sorted(closed, key=lambda pair: -pair[0])
