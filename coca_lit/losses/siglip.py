"""The pairwise sigmoid loss of SigLIP, in tiles: every image-text pair of the global batch is a binary classification.

No normalisation couples the pairs, so one pass computes value and gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from coca_lit.distributed import gather, rank
from coca_lit.losses.contrastive import TILE, tiles
from coca_lit.losses.gradients import wants_gradient, wide, with_gradients
from coca_lit.models.kernels import exact_fp32


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    tile: int = TILE,
) -> Tensor:
    """-Σ log sigmoid(±(scale · image · text + bias)) summed over all pairs, + for matching ones, divided by the number
    of images (Zhai et al. 2023, arXiv 2303.15343, algorithm 1).

    Args:
        image_features, text_features: (B, E), unit length; the same B on every rank.
        logit_scale, logit_bias: (1,); the bias accounts for most pairs not matching.
        tile: images that are scored at a time.

    Returns:
        This rank's part, its own images against the texts of all ranks, a scalar in nats whose mean over ranks is the
        global loss.
    """
    images, texts = wide(image_features), wide(gather(text_features))  # (B, E), (W·B, E)
    scale = wide(logit_scale)
    bias = wide(logit_bias)
    inputs = (images, texts, scale, bias)
    differentiate = any(map(wants_gradient, inputs))
    if differentiate:
        grad_images = torch.zeros_like(images)
        grad_texts = torch.zeros_like(texts)
        grad_bias = torch.zeros_like(bias)
    own = rank() * len(images)
    share = 1 / len(images)
    total = images.new_zeros(())
    with exact_fp32(images.device), torch.autocast(images.device.type, enabled=False), torch.no_grad():
        for rows in tiles(len(images), tile):
            logits = torch.addmm(bias, images[rows] * scale, texts.T)  # (tile, W·B)
            total += F.softplus(logits).sum() - logits.diagonal(own + rows.start).sum()
            if differentiate:
                p = logits.sigmoid_()
                p.diagonal(own + rows.start).sub_(1)
                torch.mm(p, texts, out=grad_images[rows])
                grad_texts.addmm_(p.T, images[rows])
                grad_bias += p.sum()
        if not differentiate:
            return total * share
        grad_scale = (grad_images * images).sum().view(1)
        gradients = [grad_images * scale, grad_texts * scale, grad_scale, grad_bias]
    return with_gradients(total * share, [g.mul_(share) for g in gradients], inputs)
