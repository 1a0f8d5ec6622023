"""Symmetric InfoNCE over the global batch, in tiles: no rank holds more than a few rows of its logits.

Each rank scores its own B images against the W·B texts of all ranks. The softmax over the texts of an image is then
complete on the rank; the softmax over the images of a text only needs the log-sum-exps of the other ranks, W·B numbers.
So only the texts are gathered, every logit is computed on one rank, and its gradient in the second of two passes over
the tiles: 4 matrix products where scoring images and texts separately takes 6.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from coca_lit.distributed import gather, logsumexp_over_ranks, rank
from coca_lit.losses.gradients import wants_gradient, wide, with_gradients
from coca_lit.models.kernels import exact_fp32

TILE = 256  # rows: fewer slow the products down, more do not fit the cache of a processor


def contrastive_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, tile: int = TILE) -> Tensor:
    """Symmetric InfoNCE over the global batch (CLIP, Radford et al. 2021): image i belongs to text i.

    Args:
        image_features, text_features: (B, E), unit length; the same B on every rank.
        logit_scale: (1,), inverse temperature.
        tile: images that are scored at a time.

    Returns:
        This rank's part, a scalar in nats whose mean over ranks is the global loss.
    """
    images, texts, scale = wide(image_features), wide(gather(text_features)), wide(logit_scale)  # texts: (W·B, E)
    with exact_fp32(images.device), torch.autocast(images.device.type, enabled=False), torch.no_grad():
        rows = tiles(len(images), tile)
        own = rank() * len(images)
        over_texts, over_images, pairs = log_sums(images, texts, scale, own, rows)
        total = (over_texts + over_images[own : own + len(images)] - 2 * pairs).sum()
    inputs = (images, texts, scale)
    if not any(map(wants_gradient, inputs)):
        return total / (2 * len(images))

    def errors(tile: slice) -> Tensor:
        p = sum_of_softmaxes(tile_logits(images[tile], texts, scale), over_texts[tile], over_images)
        p.diagonal(own + tile.start).sub_(2)
        return p

    with exact_fp32(images.device), torch.autocast(images.device.type, enabled=False), torch.no_grad():
        gradients = gradients_of_logits(images, texts, scale, rows, errors)
    return with_gradients(total / (2 * len(images)), gradients, inputs)


def tiles(rows: int, tile: int) -> list[slice]:
    return [slice(start, min(start + tile, rows)) for start in range(0, rows, tile)]


def tile_logits(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """(tile, E), (W·B, E) -> (tile, W·B), minus the scale, which changes no softmax: matching pairs are then near 0,
    where floating-point numbers are densest.
    """
    return torch.addmm(-scale, images * scale, texts.T)


def log_sums(
    images: Tensor, texts: Tensor, scale: Tensor, own: int, rows: list[slice]
) -> tuple[Tensor, Tensor, Tensor]:
    """log Σ exp(logit) over all texts for each own image (B,), and over the images of all ranks for each text (W·B,);
    the logits of matching pairs (B,).
    """
    over_texts = images.new_empty(len(images))
    pairs = images.new_empty(len(images))
    over_images = images.new_full((len(texts),), -torch.inf)
    for tile in rows:
        logits = tile_logits(images[tile], texts, scale)
        pairs[tile] = logits.diagonal(own + tile.start)
        over_texts[tile] = logits.logsumexp(dim=1)
        over_images = torch.logaddexp(over_images, logits.logsumexp(dim=0))
    return over_texts, logsumexp_over_ranks(over_images), pairs


def sum_of_softmaxes(logits: Tensor, over_texts: Tensor, over_images: Tensor) -> Tensor:
    """Softmax over texts + softmax over images, (tile, W·B). Works in the memory of `logits`.

    Args:
        over_texts, over_images: (tile,) and (W·B,), see `log_sums`.
    """
    p = (logits - over_texts[:, None]).exp_()
    p += logits.sub_(over_images).exp_()
    return p


def gradients_of_logits(
    images: Tensor, texts: Tensor, scale: Tensor, rows: list[slice], errors: Callable[[slice], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum of all ranks' losses, as far as it passes through the logits of own images, with respect to
    images (B, E), texts (W·B, E) and scale (1,).

    Args:
        errors: tile -> the gradient of 2 B times the loss with respect to its logits (tile, W·B): the sum of both
            softmaxes minus the sum of both targets, which are 1 for a matching pair in `contrastive_loss`.
    """
    grad_images = torch.empty_like(images)
    grad_texts = torch.zeros_like(texts)
    for tile in rows:
        p = errors(tile)
        torch.mm(p, texts, out=grad_images[tile])
        grad_texts.addmm_(p.T, images[tile])
    share = 1 / (2 * len(images))
    grad_scale = (grad_images * images).sum().view(1) * share
    return grad_images.mul_(scale * share), grad_texts.mul_(scale * share), grad_scale
