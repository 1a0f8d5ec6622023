"""The contrastive loss of captions among questions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from coca_lit.data.batch import Batch
from coca_lit.distributed import gather, rank, world_size
from coca_lit.losses.gradients import wide
from coca_lit.models import CoCa, CoCaOutput
from coca_lit.models.kernels import exact_fp32
from coca_lit.models.packing import to_device
from coca_lit.training.objectives import Objective

LEFT_OUT = -1e4  # a logit whose exponential is 0


class ContrastiveOfCaptions(Objective):
    """The softmax contrastive loss of the captions among texts of which others are questions with answers: these do not
    describe the image, and it says nothing about them. It takes the place of CoCa's own, `contrastive_weight=0`.

    Args:
        weight: factor of the loss.
    """

    needs = ("image_features", "text_features", "logit_scale")

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(contrastive_of_captions=weight)

    def build(self, net: CoCa) -> None:
        if net.logit_bias is not None:
            raise ValueError("this loss is a softmax: set model.net.contrastive=softmax")

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        images, texts = out.image_features, out.text_features
        assert images is not None
        assert texts is not None
        is_caption = captions_of(batch, texts.device)  # (B,)
        of_all_ranks = gather(is_caption)  # (W·B,)
        with exact_fp32(images.device), torch.autocast(images.device.type, enabled=False):
            masked = (1 - of_all_ranks) * LEFT_OUT
            over_texts = cross_entropies(images, texts, out.logit_scale, masked)
            over_images = cross_entropies(texts, images, out.logit_scale, masked)
        of_captions = torch.where(is_caption > 0, (over_texts + over_images) / 2, 0.0).sum()
        return {"contrastive_of_captions": of_captions * world_size() / of_all_ranks.sum().clamp(min=1)}


def captions_of(batch: Batch, device: torch.device) -> Tensor:
    """1 for a caption and 0 for a question (B,), which has words that are not predicted besides the start."""
    if batch.prefix_lengths is None:
        return torch.ones(len(batch.lengths), device=device)
    return to_device(batch.prefix_lengths == 1, device).float()


def cross_entropies(queries: Tensor, candidates: Tensor, scale: Tensor, masked: Tensor) -> Tensor:
    """-log p(own candidate | query) (B,), among the candidates of all ranks.

    Args:
        queries, candidates: (B, E), unit length.
        scale: (1,), inverse temperature.
        masked: (W·B,), added to the logits of the candidates.
    """
    logits = scale * wide(queries) @ wide(gather(candidates)).T + masked  # (B, W·B)
    own = torch.arange(len(queries), device=queries.device) + rank() * len(queries)
    return F.cross_entropy(logits, own, reduction="none")
