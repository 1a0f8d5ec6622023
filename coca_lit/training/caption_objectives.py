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
        caption = torch.ones(len(texts), device=texts.device)  # (B,)
        if batch.prefix_lengths is not None:
            caption = to_device(batch.prefix_lengths == 1, texts.device).float()
        captions = gather(caption)  # (W·B,)
        own = torch.arange(len(texts), device=texts.device) + rank() * len(texts)  # of all ranks' pairs
        with exact_fp32(images.device), torch.autocast(images.device.type, enabled=False):
            sides, left_out = (images, texts), (captions - 1) * 1e4  # exp(-1e4) = 0
            losses = [
                F.cross_entropy(out.logit_scale * wide(one) @ wide(gather(other)).T + left_out, own, reduction="none")
                for one, other in (sides, sides[::-1])  # (B,) each
            ]
        found = torch.where(caption > 0, sum(losses) / 2, 0.0).sum()
        return {"contrastive_of_captions": found * world_size() / captions.sum().clamp(min=1)}
