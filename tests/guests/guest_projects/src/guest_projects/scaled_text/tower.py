"""CoCa's text tower with scaled embeddings."""

import torch
from torch import Tensor, nn

from coca_lit.models.text import TextSizes, TextTower


class ScaledEmbedding(nn.Embedding):
    def __init__(self, count: int, width: int) -> None:
        super().__init__(count, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scale * super().forward(tokens)


class ScaledTower(TextTower):
    embeddings = (*TextTower.embeddings, "token_embedding.scale")

    def __init__(self, sizes: TextSizes) -> None:
        super().__init__(sizes)
        self.token_embedding = ScaledEmbedding(sizes.vocab_size, sizes.width)

    def init_parameters(self) -> None:
        super().init_parameters()
        nn.init.ones_(self.token_embedding.scale)
