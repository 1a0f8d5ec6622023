"""MaMMUT's image side: nothing is pooled by attention."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from coca_lit.models.init import init_projection
from coca_lit.models.poolers import Pooling, PoolingSizes


class MeanPooling(Pooling):
    """The contrastive vector is the normed mean of the image tokens; the decoder attends to all of them, brought to its
    width. Both leave out a class token.
    """

    class_token: ClassVar[bool] = False

    def __init__(self, sizes: PoolingSizes) -> None:
        super().__init__(sizes)
        self.vector_width = sizes.encoder.width
        self.token_width = sizes.text_width
        self.left_out = 0 if self.class_token else sizes.encoder.prefix_tokens
        self.norm = nn.LayerNorm(self.vector_width)
        self.to_text = nn.Linear(self.vector_width, self.token_width, bias=False)

    def parts_of_loss(self, loss: str) -> list[str]:
        return ["norm"] if loss == "contrastive" else ["to_text"]

    def init_parameters(self) -> None:
        self.norm.reset_parameters()
        init_projection(self.to_text)

    def pool(self, tokens: Tensor, contrastive: bool, captioning: bool) -> tuple[Tensor | None, Tensor | None]:
        tokens = tokens[:, self.left_out :]
        vector = self.norm(tokens.mean(dim=1)) if contrastive else None
        image_tokens = self.to_text(tokens) if captioning else None
        return vector, image_tokens

    def attention(self, tokens: Tensor) -> Tensor:
        each_at_itself = torch.eye(tokens.shape[1], device=tokens.device)[self.left_out :]  # (Q, S)
        return each_at_itself.expand(len(tokens), -1, -1)


class MeanPoolingWithClassToken(MeanPooling):
    """The same of all tokens, the class token included."""

    class_token = True
