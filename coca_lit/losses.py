"""The two losses of CoCa, as functions that return raw, unweighted terms. Both are exact on any number of ranks.

Letters: B pairs of this rank, W ranks, E embedding width, N predicted tokens of this rank, D decoder width, V
vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from coca_lit.distributed import gather, rank, sum_over_ranks, world_size


def contrastive_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over the global batch (CLIP, Radford et al. 2021): image i belongs to text i.

    Each rank scores its own B images against all W·B texts and its own B texts against all images; the mean over
    ranks is the loss of the global batch.

    Args:
        image_features, text_features: (B, E), unit length; the same B on every rank.
        logit_scale: (1,), inverse temperature.

    Returns:
        This rank's share, a scalar in nats whose mean over ranks is the global loss.
    """
    all_images, all_texts = gather(image_features), gather(text_features)  # (W·B, E)
    targets = torch.arange(len(image_features), device=image_features.device) + rank() * len(image_features)
    # Logits reach 100, where bf16 has steps of a half: this small product stays in fp32 under mixed precision.
    with torch.autocast(image_features.device.type, enabled=False):
        image_logits = logit_scale.float() * image_features.float() @ all_texts.float().T  # (B, W·B)
        text_logits = logit_scale.float() * text_features.float() @ all_images.float().T  # (B, W·B)
    return (F.cross_entropy(image_logits, targets) + F.cross_entropy(text_logits, targets)) / 2


def caption_loss(hidden: Tensor, vocabulary: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the next token, averaged over all real tokens of the global batch.

    A mean per rank, averaged over ranks, would weigh tokens of ranks with short captions more; here every token
    counts the same.

    Args:
        hidden: (N, D) decoder states that predict a token; N may differ between ranks.
        vocabulary: (V, D) projection weight.
        labels: (N,) ids of the tokens to predict; -100 is ignored.

    Returns:
        A scalar in nats per token whose mean over ranks is the global loss.
    """
    logits = F.linear(hidden, vocabulary).float()  # (N, V)
    total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    tokens = sum_over_ranks((labels != -100).sum())
    return total * world_size() / tokens.clamp(min=1)
