"""The contrastive vector is the mean beside the maximum of the tokens; the decoder attends to all tokens."""

import torch
from torch import Tensor, nn

from coca_lit.models.poolers import Pooling, PoolingSizes


class MeanMaxPooling(Pooling):
    """Mean and maximum.

    Args:
        share: factor of the maximum.
    """

    def __init__(self, sizes: PoolingSizes, share: float = 1.0) -> None:
        super().__init__(sizes)
        self.vector_width = 2 * sizes.encoder.width
        self.token_width = sizes.encoder.width
        self.share = share
        self.norm = nn.LayerNorm(self.token_width)

    def parts_of_loss(self, loss: str) -> list[str]:
        return []

    def init_parameters(self) -> None:
        self.norm.reset_parameters()

    def pool(self, tokens: Tensor, contrastive: bool, captioning: bool) -> tuple[Tensor | None, Tensor | None]:
        tokens = self.norm(tokens)  # (B, S, C)
        vector = torch.cat([tokens.mean(dim=1), self.share * tokens.amax(dim=1)], dim=1) if contrastive else None
        return vector, tokens if captioning else None

    def attention(self, tokens: Tensor) -> Tensor:
        each_at_itself = torch.eye(tokens.shape[1], device=tokens.device)  # (S, S)
        return each_at_itself.expand(len(tokens), -1, -1)
