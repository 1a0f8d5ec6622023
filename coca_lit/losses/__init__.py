"""The losses of CoCa, as functions that return unweighted terms. All are exact on any number of ranks.

Letters: B pairs of this rank, W ranks, E embedding width, N predicted tokens of this rank, D decoder width, V
vocabulary.
"""

from torch import Tensor

from coca_lit.losses.caption import caption_loss
from coca_lit.losses.contrastive import contrastive_loss
from coca_lit.losses.siglip import siglip_loss
from coca_lit.models import CoCaOutput

__all__ = [
    "caption_loss",
    "contrastive_loss",
    "contrastive_term",
    "loss_terms",
    "siglip_loss",
]


def loss_terms(out: CoCaOutput, smoothing: float = 0.0) -> dict[str, Tensor]:
    """{"contrastive": …, "caption": …}, without the one whose inputs are None.

    Args:
        smoothing: label smoothing of the caption loss.
    """
    terms = {}
    if out.image_features is not None and out.text_features is not None:
        terms["contrastive"] = contrastive_term(out.image_features, out.text_features, out.logit_scale, out.logit_bias)
    if out.hidden is not None and out.vocabulary is not None and out.labels is not None:
        terms["caption"] = caption_loss(out.hidden, out.vocabulary, out.labels, smoothing=smoothing)
    return terms


def contrastive_term(images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor | None) -> Tensor:
    """`siglip_loss` if there is a bias, else `contrastive_loss`."""
    if logit_bias is None:
        return contrastive_loss(images, texts, logit_scale)
    return siglip_loss(images, texts, logit_scale, logit_bias)
