"""Poolers of models other than the paper's: OpenCLIP 4's two, the same for images of any shape, and MaMMUT's mean."""

import torch
from torch import Tensor, nn

from coca_lit.models.init import init_projection
from coca_lit.models.inputs import EncodedFrames, EncodedPatches
from coca_lit.models.layers import AttentionalPooler, Pooling


class OpenClipPooling(Pooling):
    """The two poolers of OpenCLIP 4: the image tokens are normed once, and nothing follows either pooler, neither norm
    nor projection. Padding is never looked at.

    Args:
        parallel: both poolers attend to the normed image tokens; else the contrastive one to what the generative one
            returns.
    """

    projected = False

    def __init__(self, parallel: bool, context_width: int, width: int, queries: int, heads: int) -> None:
        super().__init__()
        self.vector_width = self.token_width = width
        self.parallel = parallel
        self.norm = nn.LayerNorm(context_width)
        self.generative = AttentionalPooler(context_width, width, queries, heads, norm_out=False)
        self.contrastive = AttentionalPooler(context_width if parallel else width, width, 1, heads, norm_out=False)

    def parts_of_loss(self, loss: str) -> list[str]:
        if loss == "contrastive":
            return ["contrastive"]
        return ["generative"] if self.parallel else []

    def init_parameters(self) -> None:
        self.norm.reset_parameters()
        _init(self.generative)
        _init(self.contrastive)

    def pool(
        self, tokens: Tensor | EncodedPatches, contrastive: bool, captioning: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        rows, mask = _rows(tokens)
        normed = self.norm(rows)
        image_tokens = self.generative(normed, mask=mask) if captioning or not self.parallel else None
        vector = None
        if contrastive:
            vector = self.contrastive(normed, mask=mask) if self.parallel else self.contrastive(image_tokens)
            vector = vector[:, 0]
        return vector, (image_tokens if captioning else None)

    def attention(self, tokens: Tensor | EncodedPatches) -> Tensor:
        rows, mask = _rows(tokens)
        return self.generative.weights(self.norm(rows), mask=mask)


class MaskedPooling(OpenClipPooling):
    """The same for images of any shape. In OpenCLIP these poolers are siblings of timm's encoder, not parts of it, and
    their queries start smaller.
    """

    def init_parameters(self) -> None:
        super().init_parameters()
        for pooler in (self.generative, self.contrastive):
            nn.init.normal_(pooler.query, std=pooler.query.shape[1] ** -0.5)


class MeanPooling(Pooling):
    """MaMMUT's: the contrastive vector is the normed mean of the image tokens; the decoder attends to all of them,
    brought to its width.

    Args:
        left_out: leading tokens, such as a class token, that neither uses.
    """

    def __init__(self, context_width: int, text_width: int, left_out: int) -> None:
        super().__init__()
        self.vector_width, self.token_width = context_width, text_width
        self.left_out = left_out
        self.norm = nn.LayerNorm(context_width)
        self.to_text = nn.Linear(context_width, text_width, bias=False)

    def parts_of_loss(self, loss: str) -> list[str]:
        return ["norm"] if loss == "contrastive" else ["to_text"]

    def init_parameters(self) -> None:
        self.norm.reset_parameters()
        init_projection(self.to_text)

    def joined(self, clips: EncodedFrames) -> Tensor:
        left_out, kept = clips.rows[:, 0, : self.left_out], clips.rows[:, :, self.left_out :]
        return torch.cat([left_out, kept.flatten(1, 2)], dim=1)

    def pool(self, tokens: Tensor, contrastive: bool, captioning: bool) -> tuple[Tensor | None, Tensor | None]:
        tokens = tokens[:, self.left_out :]
        vector = self.norm(tokens.mean(dim=1)) if contrastive else None
        return vector, (self.to_text(tokens) if captioning else None)

    def attention(self, tokens: Tensor) -> Tensor:
        # each at itself
        return torch.eye(tokens.shape[1], device=tokens.device)[self.left_out :].expand(len(tokens), -1, -1)


def _rows(tokens: Tensor | EncodedPatches) -> tuple[Tensor, Tensor | None]:
    """Image tokens (B, S, C), and a mask of those that are no padding; None if none is."""
    return (tokens.rows, tokens.key_mask()) if isinstance(tokens, EncodedPatches) else (tokens, None)


def _init(pooler: AttentionalPooler) -> None:
    """OpenCLIP 4's values: its attention starts as `nn.MultiheadAttention` does, with queries of deviation 1.

    That layer keeps q, k and v in one matrix where they have the same input width, and Xavier's bound follows from the
    shape of what is kept.
    """
    nn.init.normal_(pooler.query, std=1.0)
    attention = pooler.attention
    width, context_width = attention.q.in_features, attention.kv.in_features
    rows = 3 * width if width == context_width else width
    for linear in (attention.q, attention.kv):
        bound = (6 / (rows + linear.in_features)) ** 0.5
        nn.init.uniform_(linear.weight, -bound, bound)
    attention.out.reset_parameters()
    for linear in (attention.q, attention.kv, attention.out):
        nn.init.zeros_(linear.bias)
    for norm in (pooler.norm_query, pooler.norm_context):
        norm.reset_parameters()
