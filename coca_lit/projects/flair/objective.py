"""FLAIR's losses: sigmoid losses of all texts, of which an image has several, and the image as each text pools it.

Shapes: B images of this rank and W·B of all W ranks, K captions of each, E the width of features.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.data.batch import Batch
from coca_lit.distributed import gather, rank, world_size
from coca_lit.errors import check_number
from coca_lit.losses.gradients import wide
from coca_lit.models import CoCa, CoCaOutput
from coca_lit.models.coca import MAX_LOGIT_SCALE
from coca_lit.models.kernels import exact_fp32
from coca_lit.projects.flair.pooling import TextConditionedPooling
from coca_lit.training.objectives import Objective


class TextConditioned(Objective):
    """Two sigmoid losses. For an image its own K captions are right and one caption of every other image is wrong; they
    are compared with the image as each of them pools it, and with the image vector. They take the place of CoCa's
    contrastive loss, `model.contrastive_weight=0`.

    Args:
        heads: of the attention by which texts pool images.
        pooled_weight, plain_weight: factors of the two losses; halves, as in the paper.
    """

    needs = ("image_features", "image_tokens", "text_features", "further_text_features", "logit_scale", "logit_bias")

    def __init__(self, heads: int = 8, pooled_weight: float = 0.5, plain_weight: float = 0.5) -> None:
        super().__init__(text_conditioned=pooled_weight, plain=plain_weight)
        check_number("heads", heads, whole=True, at_least=1)
        self.heads = heads

    @property
    def config(self) -> dict[str, Any]:
        return {"heads": self.heads}

    def build(self, net: CoCa) -> None:
        if net.decoder is None:
            raise ValueError("texts pool the image tokens of the decoder, which this network lacks")
        if net.logit_bias is None:
            raise ValueError("this loss is a sigmoid: set model.net.contrastive=siglip")
        if net.config.embed_dim % self.heads:
            raise ValueError(f"heads={self.heads} does not divide embed_dim={net.config.embed_dim}")
        self.pooling = TextConditionedPooling(net.config.embed_dim, net.pooling.token_width, self.heads)
        self.scale = nn.Parameter(torch.full((1,), math.log(10)))  # SigLIP's initial values
        self.bias = nn.Parameter(torch.full((1,), -10.0))

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        assert out.image_features is not None
        assert out.image_tokens is not None
        assert out.text_features is not None
        assert out.further_text_features is not None
        assert out.logit_bias is not None
        texts, further = gather(out.text_features), out.further_text_features  # (W·B, E), (B, K - 1, E)
        images = out.image_features[:, None]  # (B, 1, E)
        with exact_fp32(texts.device), torch.autocast(texts.device.type, enabled=False):
            plain = wide(out.image_features) @ wide(texts).T  # (B, W·B)
            plain_further = (wide(images) * wide(further)).sum(dim=2)  # (B, K - 1)
        pooled, pooled_further = self.pooling(out.image_tokens, texts), self.pooling(out.image_tokens, further)
        scale = self.scale.clamp(max=MAX_LOGIT_SCALE).exp()
        return {
            "text_conditioned": sigmoid_loss(pooled, pooled_further, scale, self.bias),
            "plain": sigmoid_loss(plain, plain_further, out.logit_scale, out.logit_bias),
        }


def sigmoid_loss(cosines: Tensor, further: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """-log sigmoid(±(scale · cosine + bias)), + for texts of the image itself, summed over images and texts and divided
    by the number of texts that an image is compared with.

    Args:
        cosines: (B, W·B) of this rank's images and one text of each image of all ranks.
        further: (B, K - 1) of these images and their further texts.

    Returns:
        This rank's part, a scalar whose mean over ranks is the loss of the global batch.
    """
    own = torch.arange(len(cosines), device=cosines.device) + rank() * len(cosines)
    right = F.one_hot(own, cosines.shape[1])  # (B, W·B)
    logits = scale * torch.cat([cosines, further], dim=1) + bias  # (B, W·B + K - 1)
    targets = torch.cat([right, torch.ones_like(further)], dim=1)
    total = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    return total * world_size() / logits.shape[1]
