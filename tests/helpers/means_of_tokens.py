"""A pooler as a package outside adds one: it pools nothing by attention, and leaves out a class token."""

import torch
from torch import Tensor

from coca_lit.models.poolers import Pooling, PoolingSizes
from coca_lit.models.registry import register_pooler


@register_pooler("means_of_tokens")
class MeansOfTokens(Pooling):
    """The contrastive vector is the mean of the image tokens; the decoder attends to all of them."""

    def __init__(self, sizes: PoolingSizes) -> None:
        super().__init__(sizes)
        self.vector_width = self.token_width = sizes.encoder.width
        self.left_out = sizes.encoder.prefix_tokens

    def parts_of_loss(self, loss: str) -> list[str]:
        return []

    def init_parameters(self) -> None:
        pass

    def pool(self, tokens: Tensor, contrastive: bool, captioning: bool) -> tuple[Tensor | None, Tensor | None]:
        tokens = tokens[:, self.left_out :]
        return (tokens.mean(dim=1) if contrastive else None), (tokens if captioning else None)

    def attention(self, tokens: Tensor) -> Tensor:
        return torch.eye(tokens.shape[1])[self.left_out :].expand(len(tokens), -1, -1)
