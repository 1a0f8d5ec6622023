"""Distillation of CLIPs: the student's similarities of images and texts follow its teachers'.

Works in tiles as `coca_lit.losses.contrastive` does. Its targets are one for a matching pair; here they are the
teachers' softmaxes, so both losses share the two passes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coca_lit.distributed import gather, rank
from coca_lit.losses.contrastive import (
    TILE,
    gradients_of_logits,
    log_sums,
    sum_of_softmaxes,
    tile_logits,
    tiles,
)
from coca_lit.losses.gradients import wants_gradient, wide, with_gradients
from coca_lit.models.kernels import exact_fp32


class Teacher(NamedTuple):
    """What one teacher says of the B pairs of a batch."""

    images: Tensor  # (B, E) of its own width E, unit length
    texts: Tensor  # (B, E)
    logit_scale: float  # inverse temperature of its softmax


def distillation_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, teachers: Sequence[Teacher], tile: int = TILE
) -> Tensor:
    """KL divergence of the student's softmax over the global batch from the teachers' softmaxes, averaged over both
    directions and all teachers (MobileCLIP: Vasu et al. 2024, arXiv 2311.17049, equations 2 to 4).

    Args:
        image_features, text_features: (B, E) of the student, unit length; the same B on every rank.
        logit_scale: (1,), its inverse temperature.
        teachers: one or more, of the same pairs; they get no gradient.
        tile: images that are scored at a time.

    Returns:
        This rank's part, a scalar in nats whose mean over ranks is the global loss.
    """
    images, texts, scale = wide(image_features), wide(gather(text_features)), wide(logit_scale)  # texts: (W·B, E)
    inputs, rows, own = (images, texts, scale), tiles(len(images), tile), rank() * len(images)
    total = images.new_zeros(())

    def errors(tile: slice) -> Tensor:
        """As `gradients_of_logits` takes them; adds the divergences of the tile to `total`."""
        logits = tile_logits(images[tile], texts, scale)  # (tile, W·B)
        log_q = logits - over_texts[tile, None], logits - over_images
        targets = torch.zeros_like(logits)
        for side, (teacher_over_texts, teacher_over_images, _) in zip(sides, teacher_sums, strict=True):
            logits_of_teacher = tile_logits(side[0][tile], *side[1:])
            sums = teacher_over_texts[tile, None], teacher_over_images
            for log_sum, log_q_of_direction in zip(sums, log_q, strict=True):
                log_p = logits_of_teacher - log_sum
                p = log_p.exp().div_(len(teachers))
                total.add_((p * (log_p - log_q_of_direction)).sum())
                targets += p
        return sum_of_softmaxes(logits, over_texts[tile], over_images).sub_(targets)

    differentiate = any(map(wants_gradient, inputs))
    with exact_fp32(images.device), torch.autocast(images.device.type, enabled=False), torch.no_grad():
        sides = [  # own images (B, E), the texts of all ranks (W·B, E) and the scale (1,), as wide as the student's
            (its.images.to(images.dtype), gather(its.texts).to(images.dtype), images.new_tensor([its.logit_scale]))
            for its in teachers
        ]
        over_texts, over_images, _ = log_sums(*inputs, own, rows)
        teacher_sums = [log_sums(*side, own, rows) for side in sides]
        if differentiate:
            gradients = gradients_of_logits(*inputs, rows, errors)
        else:
            for tile_rows in rows:
                errors(tile_rows)
    loss = total / (2 * len(images))
    return with_gradients(loss, gradients, inputs) if differentiate else loss
