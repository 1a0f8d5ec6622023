"""The text side of CoCa: a causal unimodal tower that ends in a CLS token, and the multimodal decoder above it."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coca_lit.models.kernels.linear import Linear
from coca_lit.models.layers import Cache, CrossBlock, SelfBlock, normalize_once
from coca_lit.models.packing import Layout

ClsMask = Literal["correct", "legacy"]
GradCheckpointing = Literal["none", "cross_attention", "blocks"]


class TextTower(nn.Module):
    """Token ids -> a state per token, and a CLS state that has seen the caption.

    CLS stands right after its text and always takes the last position embedding (row `context_length`), as if it
    stood after all padding. `cls_mask` says what it sees: "correct", the caption and itself; "legacy", what OpenCLIP's
    off-by-one mask lets it see: the caption and the first pad, and itself only if the caption fills the context. The
    released OpenCLIP weights were trained with the latter.
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
        self.grad_checkpointing: GradCheckpointing = "none"

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor,
        contrastive: bool = True,
        packed: bool | None = None,
        longest: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Layout]:
        """Token states and, if asked for, text features (B, E) that are not normalised yet.

        Args:
            tokens: (B, T) ids, padded at the end to any T.
            lengths: (B,) number of real tokens.
            packed, longest: see `Layout`; of the rows of a text, CLS included.

        Returns:
            The states, laid out as the third value says: rows 0 … lengths - 1 of a text are its tokens; what follows
            is not for the decoder.
        """
        # Only a legacy CLS sees what stands at the first pad, and it was trained with id 0 there.
        kept = lengths if self.cls_mask == "correct" else (lengths + 1).clamp(max=self.context_length)  # (B,)
        layout = Layout(kept + contrastive, packed, longest)
        places = layout.positions.expand(lengths.shape[0], -1)  # (B, L)
        is_cls, mask = None, None
        if contrastive:
            is_cls = places == kept[:, None]  # (B, L)
            places = places.where(~is_cls, self.context_length)
            if self.cls_mask == "legacy":
                mask = legacy_attention_mask(is_cls, lengths == self.context_length)
        tokens = _fit(tokens, layout.longest)
        x = self._embed(layout.pack(tokens), layout.pack(places), None if is_cls is None else layout.pack(is_cls))
        for block in self.blocks:
            x = run(block, x, mask, None, layout, recompute=self.training and self.grad_checkpointing == "blocks")
        features = self.projection(self.norm(layout.gather_at(x, kept))) if contrastive else None
        return x, features, layout

    def step(self, tokens: Tensor, caches: Sequence[Cache], mask: Tensor | None = None) -> Tensor:
        """States (R, t, D) of the next tokens (R, t) of texts whose beginnings are in the caches, one per block."""
        x = self._embed(tokens, torch.arange(tokens.shape[1], device=tokens.device) + caches[0].used)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, mask, cache)
        return x

    def _embed(self, tokens: Tensor, places: Tensor, is_cls: Tensor | None = None) -> Tensor:
        x = self.token_embedding(tokens)
        if is_cls is not None:
            x = torch.where(is_cls[..., None], self.cls_embedding, x)
        return self.dropout(x + self.position_embedding[places])


def run(function: Callable[..., Tensor], *arguments: Any, recompute: bool) -> Tensor:
    """`function(*arguments)`, whose activations are kept for the backward pass or computed again there."""
    if not recompute:
        return function(*arguments)
    return checkpoint(_without_kept_casts(function), *arguments, use_reentrant=False)


def _without_kept_casts(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Autocast keeps its copies of all weights until the forward pass ends; here they go with what made them."""

    def call(*arguments: Any) -> Tensor:
        device = next(x.device.type for x in arguments if isinstance(x, Tensor))
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
            return function(*arguments)

    return call


def _fit(tokens: Tensor, length: int) -> Tensor:
    """Cuts or pads (B, T) to (B, length)."""
    return F.pad(tokens, (0, length - tokens.shape[1]))  # a negative padding cuts


def legacy_attention_mask(is_cls: Tensor, fills_context: Tensor) -> Tensor:
    """Boolean mask (B, 1, L, L), True where a query (row) may attend: causal, but a CLS row does not see itself unless
    its caption fills the context.

    Args:
        is_cls: (B, L), the place of each text's CLS.
        fills_context: (B,)
    """
    causal = torch.ones(is_cls.shape[1], is_cls.shape[1], dtype=torch.bool, device=is_cls.device).tril()  # (L, L)
    return (causal & ~torch.diag_embed(is_cls & ~fills_context[:, None]))[:, None]


class Decoder(nn.Module):
    """Pairs of a causal self block and a cross block over the image tokens, then the vocabulary projection (not tied
    to the embedding).
    """

    def __init__(self, vocab_size: int, width: int, image_width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_blocks = nn.ModuleList(SelfBlock(width, heads, dropout) for _ in range(layers))
        self.cross_blocks = nn.ModuleList(CrossBlock(width, image_width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.vocabulary = Linear(width, vocab_size, bias=False)
        self.grad_checkpointing: GradCheckpointing = "none"

    def keys_values(self, image_tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the image tokens (B, S, E) for every layer: all that generation needs of an image.

        They are contiguous, because every step reads them: a quarter less time in that attention for one copy.
        """
        normed = normalize_once(image_tokens)
        pairs = (block.keys_values(normed) for block in cast("list[CrossBlock]", self.cross_blocks))
        return [(keys.contiguous(), values.contiguous()) for keys, values in pairs]

    def forward(self, states: Tensor, image_tokens: Tensor | None, layout: Layout | None = None) -> Tensor:
        """Token states (B, T, D), or packed as `layout` says, and image tokens (B, S, E) -> hidden states of the same
        shape as the token states, ready for `vocabulary`. Without image tokens the cross blocks are skipped.
        """
        image = None if image_tokens is None else normalize_once(image_tokens)
        for self_block, cross_block in zip(self.self_blocks, self.cross_blocks, strict=True):
            recompute = self.grad_checkpointing if self.training else "none"
            states = run(self_block, states, None, None, layout, recompute=recompute == "blocks")
            if image is not None:
                states = run(cross_block, states, image, layout, recompute=recompute != "none")
        return self.norm(states)

    def step(
        self,
        states: Tensor,
        keys_values: list[tuple[Tensor, Tensor]],
        caches: Sequence[Cache],
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (R, t, D) of the next token states (R, t, D). There may be several rows for each of B images,
        side by side.
        """
        images = len(keys_values[0][0])
        for self_block, cross_block, image, cache in zip(
            self.self_blocks, self.cross_blocks, keys_values, caches, strict=True
        ):
            states = self_block(states, mask, cache)
            states = cross_block(_beside(states, images), image).view_as(states)
        return self.norm(states)

    def attention(self, states: Tensor, image_tokens: Tensor) -> Tensor:
        """Where each position looks: weights (R, T, S) over the image tokens (B, S, E), the mean over layers and
        heads; rows add up to 1.
        """
        total = states.new_zeros(())
        normed = normalize_once(image_tokens)
        for self_block, cross_block in zip(self.self_blocks, cast("list[CrossBlock]", self.cross_blocks), strict=True):
            image = cross_block.keys_values(normed)
            states = self_block(states)
            queries = _beside(states, len(image_tokens))
            total = total + cross_block.weights(queries, image).mean(dim=1)  # (B, R / B · T, S)
            states = cross_block(queries, image).view_as(states)
        return total.view(*states.shape[:2], image_tokens.shape[1]) / len(self.cross_blocks)


def _beside(states: Tensor, images: int) -> Tensor:
    """Puts the rows of an image side by side as queries of one attention, so that nothing of the image is repeated:
    (R, T, D) -> (B, R / B · T, D).
    """
    rows, length, width = states.shape
    return states.reshape(images, rows // max(images, 1) * length, width)
