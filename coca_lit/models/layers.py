"""Transformer parts of CoCa: attention and pre-norm blocks.

Shape letters, here and in the other model files: B batch, T text positions, S image tokens, D width, H heads, E
embedding width, V vocabulary, R rows of captions that are being written.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.models import kernels
from coca_lit.models.packing import KVCache, Layout

KeysValues = tuple[Tensor, Tensor]  # each (B, H, S, D/H)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"the width ({width}) must be a multiple of the number of heads ({heads})")
        self.heads = heads
        self.qkv = kernels.Linear(width, 3 * width)
        self.out = kernels.Linear(width, width)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, layout: Layout | None = None
    ) -> Tensor:
        """x (B, T, D), or rows packed as `layout` says, -> the same shape. Causal unless a boolean `mask`
        (B or 1, 1, T or 1, keys), True where attention is allowed, says otherwise.
        """
        qkv = self.qkv(x)
        if cache is None:
            return self.out(kernels.self_attention(qkv, self.heads, mask, layout))
        q, k, v = (split_heads(part, self.heads) for part in qkv.chunk(3, dim=-1))  # each (R, H, t, D/H)
        return self.out(attend_cached(q, k, v, cache, mask))


def attend_cached(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, mask: Tensor | None) -> Tensor:
    """Attention of new positions, each of q, k, v (R, H, t, D/H), to themselves and those in the cache: (R, t, D)."""
    k, v = cache.append(k, v)
    # One new position sees everything before it; several are the start of a text, with the usual triangle.
    causal = mask is None and q.shape[2] > 1
    return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal))


class CrossAttention(nn.Module):
    """Attention from x to a context of another width; keys and values can be computed once and reused."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"the width ({width}) must be a multiple of the number of heads ({heads})")
        self.heads = heads
        self.q = kernels.Linear(width, width)
        self.kv = nn.Linear(context_width, 2 * width)
        self.out = kernels.Linear(width, width)

    def keys_values(self, context: Tensor, norm: nn.LayerNorm | None = None) -> KeysValues:
        """context (B, S, C) -> keys and values, each (B, H, S, D/H); `norm` as in `forward`."""
        k, v = kernels.linear(context, *self._folded(norm)).chunk(2, dim=-1)
        return split_heads(k, self.heads), split_heads(v, self.heads)

    def forward(
        self,
        x: Tensor,
        context: Tensor | KeysValues,
        norm: nn.LayerNorm | None = None,
        layout: Layout | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, D), or rows packed as `layout` says, -> the same shape.

        Args:
            context: (B, S, C), or its keys and values, which go with padded x only.
            norm: the norm that the context still has to pass, if it has passed `normalize_once`.
            mask: (B, 1, 1, S), True where keys and values may be attended to; goes with keys and values only.
        """
        q = self.q(x)
        if isinstance(context, Tensor):
            return self.out(kernels.cross_attention(q, context, *self._folded(norm), self.heads, layout))
        return self.out(merge_heads(kernels.attention(split_heads(q, self.heads), *context, mask)))

    def weights(self, x: Tensor, keys_values: KeysValues, mask: Tensor | None = None) -> Tensor:
        """How much each position of x (B, T, D) attends to each of the context: (B, H, T, S), rows add up to 1."""
        q = split_heads(self.q(x), self.heads)
        k = keys_values[0]
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1)

    def _folded(self, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
        """Weight and bias of `kv` with those of the norm before it: W (g x + h) + b = (W g) x + (W h + b)."""
        if norm is None:
            return self.kv.weight, self.kv.bias
        return self.kv.weight * norm.weight, torch.addmv(self.kv.bias, self.kv.weight, norm.bias)


class MLP(nn.Sequential):
    """Two linear layers.

    Args:
        hidden: the width between them.
    """

    def __init__(self, width: int, hidden: int, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__(kernels.Linear(width, hidden), activation(), kernels.Linear(hidden, width))

    @property
    def first(self) -> nn.Module:
        return self[0]

    @property
    def last(self) -> nn.Module:
        return self[2]


class SelfBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        mlp_width: hidden width of the MLP; None for four times the width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float = 0.0,
        activation: type[nn.Module] = nn.GELU,
        mlp_width: int | None = None,
    ) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width if mlp_width is None else mlp_width, activation)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, layout: Layout | None = None
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_1(x), mask, cache, layout))
        return x + self.dropout(self.mlp(self.norm_2(x)))


class CrossBlock(nn.Module):
    """A `SelfBlock` whose attention looks at image tokens, which have a norm of their own.

    All blocks look at the same tokens, so these arrive with mean 0 and variance 1 already (`normalize_once`): one
    tensor for all blocks instead of one that each block's backward pass would have to keep.

    Args:
        mlp_width: hidden width of the MLP; None for four times the width.
    """

    def __init__(
        self, width: int, context_width: int, heads: int, dropout: float = 0.0, mlp_width: int | None = None
    ) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(context_width)
        self.attention = CrossAttention(width, context_width, heads)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width if mlp_width is None else mlp_width)
        self.dropout = nn.Dropout(dropout)

    def keys_values(self, normed: Tensor) -> KeysValues:
        return self.attention.keys_values(normed, self.norm_context)

    def forward(self, x: Tensor, image: Tensor | KeysValues, layout: Layout | None = None) -> Tensor:
        """x (B, T, D), or rows packed as `layout` says, -> the same shape.

        Args:
            image: tokens (B, S, C) that passed `normalize_once`, or for padded x `keys_values` of them.
        """
        x = x + self.dropout(self.attention(self.norm_1(x), image, self.norm_context, layout))
        return x + self.dropout(self.mlp(self.norm_2(x)))

    def weights(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        return self.attention.weights(self.norm_1(x), keys_values)


def normalize_once(context: Tensor) -> Tensor:
    """(B, S, C) with mean 0 and variance 1 over C, in the type in which the layers that share it will multiply."""
    normed = F.layer_norm(context, context.shape[-1:])
    if torch.is_autocast_enabled(context.device.type):  # else every layer would make and keep a copy of its own
        normed = normed.to(torch.get_autocast_dtype(context.device.type))
    return normed


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, T, D) -> (B, H, T, D/H)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, H, T, D/H) -> (B, T, D)


def by_image(states: Tensor, images: int) -> Tensor:
    """The rows of an image side by side as queries of one attention, so that nothing of the image is repeated:
    (R, T, D) -> (B, R / B · T, D).
    """
    rows, length, width = states.shape
    if rows == images:  # also where a graph is recorded for any number of them
        return states
    return states.reshape(images, rows // images * length, width)
