"""The text side of CoCa: a causal unimodal tower that ends in a CLS token, and the multimodal decoder above it."""

from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coca_lit.models.layers import CrossBlock, KVCache, SelfBlock

ClsMask = Literal["correct", "legacy"]


class TextTower(nn.Module):
    """Token ids -> a state per token, and a CLS state that has seen the caption.

    CLS stands after the text and always takes the last position embedding (row `context_length`), however short the
    batch has been cut, so cutting changes nothing. `cls_mask` says what it sees: "correct", the caption and itself;
    "legacy", what OpenCLIP's off- by-one mask lets it see: the caption and the first pad, and itself only if the
    caption fills the context. The released OpenCLIP weights were trained with the latter.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        cls_mask: ClsMask,
        dropout: float,
    ) -> None:
        super().__init__()
        if cls_mask not in ("correct", "legacy"):
            raise ValueError(f"cls_mask must be 'correct' or 'legacy', got '{cls_mask}'")
        self.context_length = context_length
        self.cls_mask = cls_mask
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(context_length + 1, width))
        self.cls_embedding = nn.Parameter(torch.empty(width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(SelfBlock(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)  # of the CLS state only; the decoder takes token states as they are
        self.projection = nn.Linear(width, embed_dim, bias=False)
        self.grad_checkpointing = False

    def forward(self, tokens: Tensor, lengths: Tensor, contrastive: bool = True) -> tuple[Tensor, Tensor | None]:
        """tokens (B, T), lengths (B,) -> token states (B, T, D) and, if asked for, text features (B, E) that are not
        normalised yet.
        """
        return self.encode(self._fit(tokens, lengths), lengths, contrastive)

    def encode(self, tokens: Tensor, lengths: Tensor, contrastive: bool = True) -> tuple[Tensor, Tensor | None]:
        """`forward` for tokens (B, T) that are as wide as they should be: no shape depends on a value, so that a graph
        of it can be exported (which is also why the code says `shape[0]` and not `len`).
        """
        length = tokens.shape[1]
        x = self._embed(tokens, 0)  # (B, T, D)
        mask = None
        if contrastive:
            cls = (self.cls_embedding + self.position_embedding[-1]).expand(tokens.shape[0], 1, -1)
            x = torch.cat([x, cls], dim=1)  # (B, T + 1, D)
            mask = cls_attention_mask(lengths, length, self.context_length, self.cls_mask)
        for block in self.blocks:
            x = (
                checkpoint(block, x, mask, use_reentrant=False)
                if self.grad_checkpointing and self.training
                else block(x, mask)
            )
        features = self.projection(self.norm(x[:, -1])) if contrastive else None
        return x[:, :length], features

    def step(self, tokens: Tensor, caches: list[KVCache]) -> Tensor:
        """States (R, t, D) of the next tokens (R, t) of texts whose beginnings are in the caches, one per block."""
        x = self._embed(tokens, caches[0].used)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache=cache)
        return x

    def _embed(self, tokens: Tensor, start: int) -> Tensor:
        return self.dropout(self.token_embedding(tokens) + self.position_embedding[start : start + tokens.shape[1]])

    def _fit(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Cuts to the longest caption; the legacy mask also needs the first pad after it."""
        longest = int(lengths.max()) if len(lengths) else 1
        needed = min(longest + (self.cls_mask == "legacy"), self.context_length)
        if tokens.shape[1] >= needed:
            return tokens[:, :needed]
        # Only a legacy CLS sees what stands at a pad, and it was trained with id 0 there.
        return nn.functional.pad(tokens, (0, needed - tokens.shape[1]))


def cls_attention_mask(lengths: Tensor, length: int, context_length: int, kind: ClsMask) -> Tensor:
    """Boolean mask (B, 1, T + 1, T + 1), True where a query (row) may attend.

    Tokens are causal; the last row is the CLS token.

    Worked example: lengths [2], T = 4, correct: the CLS row is [1 1 0 0 1]; legacy: [1 1 1 0 0].
    """
    keys = torch.arange(length + 1, device=lengths.device)
    mask = (keys <= keys[:, None]).repeat(lengths.shape[0], 1, 1)  # (B, T + 1, T + 1)
    if kind == "correct":
        mask[:, -1] = (keys < lengths[:, None]) | (keys == length)
    else:
        mask[:, -1] = (keys <= lengths[:, None]) & ((keys < length) | (lengths == context_length)[:, None])
    return mask[:, None]


class Decoder(nn.Module):
    """Pairs of a causal self block and a cross block over the image tokens, then the vocabulary projection (not tied
    to the embedding).
    """

    def __init__(self, vocab_size: int, width: int, image_width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_blocks = nn.ModuleList(SelfBlock(width, heads, dropout) for _ in range(layers))
        self.cross_blocks = nn.ModuleList(CrossBlock(width, image_width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.vocabulary = nn.Linear(width, vocab_size, bias=False)
        self.grad_checkpointing = False

    def keys_values(self, image_tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the image tokens (B, S, E) for every layer: all that generation needs of an image.

        They are contiguous, because every step reads them: a quarter less time in that attention for one copy.
        """
        pairs = (block.keys_values(image_tokens) for block in cast("list[CrossBlock]", self.cross_blocks))
        return [(keys.contiguous(), values.contiguous()) for keys, values in pairs]

    def forward(self, states: Tensor, image_tokens: Tensor) -> Tensor:
        """Token states (B, T, D) and image tokens (B, S, E) -> hidden states (B, T, D), ready for `vocabulary`."""
        for self_block, cross_block in zip(self.self_blocks, self.cross_blocks, strict=True):
            if self.grad_checkpointing and self.training:
                states = checkpoint(_decoder_layer, self_block, cross_block, states, image_tokens, use_reentrant=False)
            else:
                states = _decoder_layer(self_block, cross_block, states, image_tokens)
        return self.norm(states)

    def step(self, states: Tensor, keys_values: list[tuple[Tensor, Tensor]], caches: list[KVCache]) -> Tensor:
        """Hidden states (R, t, D) of the next token states (R, t, D). There may be several rows for each of B images,
        side by side.
        """
        images = len(keys_values[0][0])
        for self_block, cross_block, image, cache in zip(
            self.self_blocks, self.cross_blocks, keys_values, caches, strict=True
        ):
            states = self_block(states, cache=cache)
            states = cross_block(_beside(states, images), image).view_as(states)
        return self.norm(states)

    def attention(self, states: Tensor, image_tokens: Tensor) -> Tensor:
        """Where each position looks: weights (R, T, S) over the image tokens (B, S, E), the mean over layers and
        heads; rows add up to 1.
        """
        total = states.new_zeros(())
        for self_block, cross_block in zip(self.self_blocks, cast("list[CrossBlock]", self.cross_blocks), strict=True):
            image = cross_block.keys_values(image_tokens)
            states = self_block(states)
            queries = _beside(states, len(image_tokens))
            total = total + cross_block.weights(queries, image).mean(dim=1)  # (B, R / B · T, S)
            states = cross_block(queries, image).view_as(states)
        return total.view(*states.shape[:2], image_tokens.shape[1]) / len(self.cross_blocks)


def _decoder_layer(self_block: nn.Module, cross_block: nn.Module, states: Tensor, image_tokens: Tensor) -> Tensor:
    return cross_block(self_block(states), cast(CrossBlock, cross_block).keys_values(image_tokens))


def _beside(states: Tensor, images: int) -> Tensor:
    """Puts the rows of an image side by side as queries of one attention, so that nothing of the image is repeated:
    (R, T, D) -> (B, R / B · T, D).
    """
    rows, length, width = states.shape
    return states.reshape(images, rows // max(images, 1) * length, width)
