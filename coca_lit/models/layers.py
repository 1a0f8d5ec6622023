"""Transformer parts of CoCa: attention with an optional key/value cache, pre-norm blocks, and the attentional pooler.

Shape letters, here and in the other model files: B batch, T text positions, S image tokens, D width, H heads, E
embedding width, V vocabulary, R rows of captions that are being written.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.models import kernels
from coca_lit.models.packing import Layout

# (beginning of names in a part, beginning of their names in OpenCLIP, {name inside: OpenCLIP's})
OpenClipNames = tuple[tuple[str, str, dict[str, str]], ...]


class KVCache:
    """Keys and values of one causal attention layer during generation; positions are appended, rows can be selected."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.used = 0
        self._keys_values: Tensor | None = None  # (2, R, H, max_length, D/H)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (R, H, t, D/H) of new positions and returns keys and values of all positions so far."""
        if self._keys_values is None:
            rows, heads, _, width = keys.shape
            self._keys_values = keys.new_empty(2, rows, heads, self.max_length, width)
        end = self.used + keys.shape[2]
        self._keys_values[0, :, :, self.used : end] = keys
        self._keys_values[1, :, :, self.used : end] = values
        self.used = end
        return self._keys_values[0, :, :, :end], self._keys_values[1, :, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keeps the given rows, in that order; a row may appear several times."""
        if self._keys_values is None:
            return
        written = self._keys_values[:, rows, :, : self.used]
        if len(rows) != self._keys_values.shape[1]:
            _, _, heads, _, width = self._keys_values.shape
            self._keys_values = written.new_empty(2, len(rows), heads, self.max_length, width)
        self._keys_values[:, :, :, : self.used] = written

    def storage(self) -> Tensor:
        """Keys and values (2, R, H, max_length, D/H) of all positions, 0 for those to come."""
        assert self._keys_values is not None
        self._keys_values[:, :, :, self.used :] = 0
        return self._keys_values


class StaticKVCache:
    """A cache whose shapes do not depend on how many positions are written: `append` returns all, and a mask must hide
    the rest.
    """

    def __init__(self, keys_values: Tensor, used: Tensor) -> None:
        self.keys_values = keys_values  # (2, R, H, max_length, D/H)
        self.used = used  # (1,)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (R, H, 1, D/H) at position `used`."""
        self.keys_values[0].index_copy_(2, self.used, keys)
        self.keys_values[1].index_copy_(2, self.used, values)
        return self.keys_values[0], self.keys_values[1]


Cache = KVCache | StaticKVCache
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
        self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None, layout: Layout | None = None
    ) -> Tensor:
        """x (B, T, D), or rows packed as `layout` says, -> the same shape. Causal unless a boolean `mask`
        (B or 1, 1, T or 1, keys), True where attention is allowed, says otherwise.
        """
        qkv = self.qkv(x)
        if cache is None:
            return self.out(kernels.self_attention(qkv, self.heads, mask, layout))
        q, k, v = (split_heads(part, self.heads) for part in qkv.chunk(3, dim=-1))  # each (R, H, t, D/H)
        return self.out(attend_cached(q, k, v, cache, mask))


def attend_cached(q: Tensor, k: Tensor, v: Tensor, cache: Cache, mask: Tensor | None) -> Tensor:
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
        q, k = split_heads(self.q(x), self.heads), keys_values[0]
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1)

    def _folded(self, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
        """Weight and bias of `kv` with those of the norm before it: W (g x + h) + b = (W g) x + (W h + b)."""
        if norm is None:
            return self.kv.weight, self.kv.bias
        return self.kv.weight * norm.weight, torch.addmv(self.kv.bias, self.kv.weight, norm.bias)


class MLP(nn.Sequential):
    def __init__(self, width: int, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__(kernels.Linear(width, 4 * width), activation(), kernels.Linear(4 * width, width))


class SelfBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    open_clip_names: ClassVar = {
        "norm_1": "ln_1",
        "norm_2": "ln_2",
        "attention.qkv.": "attn.in_proj_",
        "attention.out": "attn.out_proj",
        "mlp.0": "mlp.c_fc",
        "mlp.2": "mlp.c_proj",
    }

    def __init__(self, width: int, heads: int, dropout: float = 0.0, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, activation=activation)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None, layout: Layout | None = None
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_1(x), mask, cache, layout))
        return x + self.dropout(self.mlp(self.norm_2(x)))


class CrossBlock(nn.Module):
    """A `SelfBlock` whose attention looks at image tokens, which have a norm of their own.

    All blocks look at the same tokens, so these arrive with mean 0 and variance 1 already (`normalize_once`): one
    tensor for all blocks instead of one that each block's backward pass would have to keep.
    """

    open_clip_names: ClassVar = {**SelfBlock.open_clip_names, "norm_context": "ln_1_kv"}

    def __init__(self, width: int, context_width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(context_width)
        self.attention = CrossAttention(width, context_width, heads)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)
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


class QueryPooler(nn.Module):
    """Learned queries that attend to a sequence of any length and return one token each: no residual, no MLP
    (CoCa, arXiv 2205.01917).
    """

    open_clip_names: ClassVar = {"norm_query": "ln_q", "norm_context": "ln_k", "attention.out": "attn.out_proj"}

    def __init__(self, context_width: int, width: int, queries: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, width))
        self.norm_query = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(context_width)
        self.attention = CrossAttention(width, context_width, heads)

    def forward(self, context: Tensor, queries: slice = slice(None), mask: Tensor | None = None) -> Tensor:
        """context (B, S, C) -> (B, Q, E), for the given slice of the queries; `mask` as of `CrossAttention`."""
        return self.attention(*self._inputs(context, queries), mask=mask)

    def weights(self, context: Tensor, queries: slice = slice(None), mask: Tensor | None = None) -> Tensor:
        """Attention of each query: (B, Q, S) over the context (B, S, C), the mean over heads; rows add up to 1."""
        return self.attention.weights(*self._inputs(context, queries), mask).mean(dim=1)

    def _inputs(self, context: Tensor, queries: slice) -> tuple[Tensor, KeysValues]:
        """The queries (B, Q, E), and keys and values of the context."""
        query = self.norm_query(self.query[queries]).expand(context.shape[0], -1, -1)
        return query, self.attention.keys_values(self.norm_context(context))


class AttentionalPooler(QueryPooler):
    """A `QueryPooler` with a norm on its tokens."""

    def __init__(self, context_width: int, width: int, queries: int, heads: int) -> None:
        super().__init__(context_width, width, queries, heads)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, context: Tensor, queries: slice = slice(None), mask: Tensor | None = None) -> Tensor:
        return self.norm_out(super().forward(context, queries, mask))


def layers_from_the_top(blocks: nn.ModuleList, *embeddings: str) -> dict[str, int]:
    """{parameter of a text tower: layers from the top}: 1 in the last block, one more in each before it, and in the
    embeddings one more than in the first.
    """
    depths = {
        f"blocks.{i}.{name}": len(blocks) - i for i, block in enumerate(blocks) for name, _ in block.named_parameters()
    }
    return depths | dict.fromkeys(embeddings, len(blocks) + 1)


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
    return states.reshape(images, rows // max(images, 1) * length, width)
