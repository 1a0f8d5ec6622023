"""All captions of an image in one step, beside the drawn one.

Shapes: B images of this rank, K captions of each, L their tokens, E the width of features.
"""

import torch
from torch import Tensor

from coca_lit.data.batch import Batch
from coca_lit.losses import contrastive_term
from coca_lit.models import CoCa, CoCaOutput
from coca_lit.training.objectives import Objective, caption_term


class FurtherCaptions(Objective):
    """CoCa's losses of the captions of each image besides the first, K - 1 of them with `data.captions=K`. The
    contrastive loss is the mean of K - 1 losses, each of one further caption an image: captions of one image are never
    negatives of each other. The caption loss is the mean over all their tokens.

    Args:
        contrastive_weight, caption_weight: factors of the two losses; 0 leaves one out.
    """

    averages_tokens = True

    def __init__(self, contrastive_weight: float = 1.0, caption_weight: float = 2.0) -> None:
        super().__init__(further_contrastive=contrastive_weight, further_caption=caption_weight)
        needs: list[str] = []
        if contrastive_weight:
            needs += ["image_features", "further_text_features", "logit_scale", "logit_bias"]
        if caption_weight:
            needs += ["image_tokens"]
        self.needs = tuple(needs)

    def build(self, net: CoCa) -> None:
        if self.weights["further_caption"]:
            if net.decoder is None:
                raise ValueError("a caption loss needs a decoder: set caption_weight=0")
            self.trains = net.parts_for(("hidden", "vocabulary"))

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if self.weights["further_contrastive"]:
            terms["further_contrastive"] = contrastive(out)
        if self.weights["further_caption"]:
            terms["further_caption"] = caption(net, batch, out)
        return terms


def contrastive(out: CoCaOutput) -> Tensor:
    assert out.image_features is not None
    assert out.further_text_features is not None
    losses = [
        contrastive_term(out.image_features, features.contiguous(), out.logit_scale, out.logit_bias)
        for features in out.further_text_features.unbind(dim=1)  # (B, E) each
    ]
    return torch.stack(losses).mean()


def caption(net: CoCa, batch: Batch, out: CoCaOutput) -> Tensor:
    assert out.image_tokens is not None
    tokens, lengths = batch.extras["further_tokens"], batch.extras["further_lengths"]  # (B, K - 1, L), (B, K - 1)
    image_tokens = out.image_tokens.repeat_interleave(tokens.shape[1], dim=0)  # (B · (K - 1), Q, T)
    return caption_term(net.captions_of(image_tokens, tokens.flatten(0, 1), lengths.flatten()))
