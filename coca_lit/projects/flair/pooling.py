"""FLAIR's pooling (Xiao et al. 2025, arXiv 2412.03561): a text is the query of one attention over the image tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.losses.gradients import wide
from coca_lit.models.kernels import exact_fp32


class TextConditionedPooling(nn.Module):
    """Image tokens and the vectors of texts -> for each pair the cosine of the text and of the image as it pools it. A
    text may also attend to nothing, a key and a value of zeros.

    Args:
        width: E, of the vectors of texts.
        image_width: T, of the image tokens.
        heads: of the attention.
    """

    def __init__(self, width: int, image_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_text = nn.LayerNorm(width)
        self.norm_image = nn.LayerNorm(image_width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(image_width, width)
        self.value = nn.Linear(image_width, width)
        self.out = nn.Linear(width, width)

    def forward(self, image_tokens: Tensor, texts: Tensor) -> Tensor:
        """(B, Q, T) and (N, E) of unit length, or (B, N, E) of each image's own texts -> cosines (B, N)."""
        with exact_fp32(texts.device), torch.autocast(texts.device.type, enabled=False):
            images = self.norm_image(wide(image_tokens))
            texts = wide(texts).expand(len(images), -1, -1)  # (B, N, E)
            query = self._split(self.query(self.norm_text(texts)))
            key = self._split(with_nothing(self.key(images)))
            value = self._split(with_nothing(self.value(images)))
            pooled = F.scaled_dot_product_attention(query, key, value)  # (B, heads, N, E / heads)
            pooled = self.out(pooled.transpose(1, 2).flatten(2))  # (B, N, E)
            return F.cosine_similarity(pooled, texts, dim=2)

    def _split(self, x: Tensor) -> Tensor:
        """(B, S, E) -> (B, heads, S, E / heads)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def with_nothing(tokens: Tensor) -> Tensor:
    """(B, Q, E) -> (B, Q + 1, E), with a last token of zeros."""
    return F.pad(tokens, (0, 0, 0, 1))
