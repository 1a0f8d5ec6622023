"""Distillation of CLIPs: the student's similarities of images and texts follow its teachers'.

Works in tiles as `coca_lit.losses.contrastive` does. Its targets are one for a matching pair; here they are the
teachers' softmaxes, so both losses share the two passes.

Letters: B pairs of this rank, W ranks, E embedding width.
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


class _Similarities(NamedTuple):
    """Of the own images with the texts of all ranks, as the student or a teacher sees them."""

    images: Tensor  # (B, E)
    texts: Tensor  # (W·B, E)
    scale: Tensor  # (1,)
    over_texts: Tensor  # (B,), log-sum-exps, see `log_sums`
    over_images: Tensor  # (W·B,)

    def logits(self, tile: slice) -> Tensor:
        """(tile, W·B)."""
        return tile_logits(self.images[tile], self.texts, self.scale)

    def log_softmaxes(self, logits: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
        """Over the texts of each image, and over the images of each text, (tile, W·B) each."""
        return logits - self.over_texts[tile, None], logits - self.over_images


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
    images = wide(image_features)  # (B, E)
    texts = wide(gather(text_features))  # (W·B, E)
    scale = wide(logit_scale)  # (1,)
    inputs = (images, texts, scale)
    rows = tiles(len(images), tile)
    is_differentiated = any(map(wants_gradient, inputs))
    with exact_fp32(images.device), torch.autocast(images.device.type, enabled=False), torch.no_grad():
        student = _similarities(images, texts, scale, rows)
        taught = [
            _similarities(
                teacher.images.to(images.dtype),
                gather(teacher.texts).to(images.dtype),
                images.new_tensor([teacher.logit_scale]),
                rows,
            )
            for teacher in teachers
        ]
        total = images.new_zeros(())

        def errors(part: slice) -> Tensor:
            """As `gradients_of_logits` takes them; adds the divergences of the tile to `total`."""
            logits = student.logits(part)
            of_student = student.log_softmaxes(logits, part)
            targets = torch.zeros_like(logits)
            for teacher in taught:
                of_teacher = teacher.log_softmaxes(teacher.logits(part), part)
                for log_p, log_q in zip(of_teacher, of_student, strict=True):
                    p = log_p.exp().div_(len(taught))
                    total.add_((p * (log_p - log_q)).sum())
                    targets += p
            return sum_of_softmaxes(logits, student.over_texts[part], student.over_images).sub_(targets)

        if is_differentiated:
            gradients = gradients_of_logits(images, texts, scale, rows, errors)
        else:
            for part in rows:
                errors(part)
    loss = total / (2 * len(images))
    return with_gradients(loss, gradients, inputs) if is_differentiated else loss


def _similarities(images: Tensor, texts: Tensor, scale: Tensor, rows: list[slice]) -> _Similarities:
    own = rank() * len(images)
    over_texts, over_images, _ = log_sums(images, texts, scale, own, rows)
    return _Similarities(images, texts, scale, over_texts, over_images)
