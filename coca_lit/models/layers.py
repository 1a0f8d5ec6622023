"""Transformer parts of CoCa: attention with an optional key/value cache, pre-norm blocks, and the attentional pooler.

Shape letters, here and in the other model files: B batch, T text positions, S image tokens, D width, H heads, E
embedding width, V vocabulary. All attention goes through `scaled_dot_product_attention`, which picks the fastest
kernel of the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.models.kernels import packed_attention as ragged
from coca_lit.models.kernels.linear import Linear, is_inference, linear
from coca_lit.models.packing import Layout

FEW_QUERIES = 16


class KVCache:
    """Keys and values of one causal attention layer during generation; positions are appended, rows can be selected."""

    def __init__(self, length: int) -> None:
        self.length = length  # positions that will be needed at most
        self.used = 0
        self._keys_values: Tensor | None = None  # (2, R, H, length, D/H)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (R, H, t, D/H) of new positions and returns keys and values of all positions so far."""
        if self._keys_values is None:
            rows, heads, _, width = keys.shape
            self._keys_values = keys.new_empty(2, rows, heads, self.length, width)
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
            self._keys_values = written.new_empty(2, len(rows), heads, self.length, width)
        self._keys_values[:, :, :, : self.used] = written

    def whole(self) -> Tensor:
        """Keys and values (2, R, H, length, D/H) of all positions; those to come are 0."""
        assert self._keys_values is not None
        self._keys_values[:, :, :, self.used :] = 0
        return self._keys_values


class StaticKVCache:
    """Shapes do not depend on how many positions are written: `append` returns all, and a mask must hide the rest."""

    def __init__(self, keys_values: Tensor, used: Tensor) -> None:
        self.keys_values = keys_values  # (2, R, H, length, D/H)
        self.used = used  # (1,)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (R, H, 1, D/H) at position `used`."""
        self.keys_values[0].index_copy_(2, self.used, keys)
        self.keys_values[1].index_copy_(2, self.used, values)
        return self.keys_values[0], self.keys_values[1]


Cache = KVCache | StaticKVCache


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"the width ({width}) must be a multiple of the number of heads ({heads})")
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None, layout: Layout | None = None
    ) -> Tensor:
        """x (B, T, D), or rows packed as `layout` says, -> the same shape. Causal unless a boolean `mask`
        (B, 1, T, T), True where attention is allowed, says otherwise.
        """
        qkv = self.qkv(x)
        if (lengths := _lengths(layout)) is not None:  # (N, 3·D)
            masks = ragged.causal_masks(lengths, mask, qkv.dtype)
            return self.out(ragged.self_attention(qkv, self.heads, lengths, masks))
        qkv = qkv if layout is None else layout.unpack(qkv)  # (B, T, 3·D)
        q, k, v = (_split_heads(part, self.heads) for part in qkv.chunk(3, dim=-1))  # each (B, H, T, D/H)
        if cache is not None:
            k, v = cache.append(k, v)
        # With a cache one new position sees everything before it; several are the start of a text, where causal means
        # the usual triangle.
        causal = mask is None and (cache is None or q.shape[2] > 1)
        x = _merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal))
        return self.out(x if layout is None else layout.pack(x))


KeysValues = tuple[Tensor, Tensor]


class CrossAttention(nn.Module):
    """Attention from x to a context of another width; keys and values can be computed once and reused."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"the width ({width}) must be a multiple of the number of heads ({heads})")
        self.heads, self.head_width = heads, width // heads
        self.q = Linear(width, width)
        self.kv = nn.Linear(context_width, 2 * width)
        self.out = Linear(width, width)

    def keys_values(self, context: Tensor, norm: nn.LayerNorm | None = None) -> KeysValues:
        """context (B, S, C) -> keys and values, each (B, H, S, D/H).

        Args:
            norm: what the context would have to pass first, if it passed `normalize_once` instead.
        """
        k, v = linear(context, *self._folded(norm)).chunk(2, dim=-1)
        return _split_heads(k, self.heads), _split_heads(v, self.heads)

    def forward(self, x: Tensor, keys_values: KeysValues, layout: Layout | None = None) -> Tensor:
        """x (B, T, D), or rows packed as `layout` says, -> the same shape."""
        q = self.q(x) if layout is None else layout.unpack(self.q(x))
        x = _merge_heads(_attend(_split_heads(q, self.heads), *keys_values))
        return self.out(x if layout is None else layout.pack(x))

    def attend_without_kv(self, x: Tensor, context: Tensor, norm: nn.LayerNorm, lengths: list[int]) -> Tensor:
        """`forward` for packed texts x (N, D) of these lengths, without making keys and values."""
        weight, bias = self._folded(norm)
        q = self.q(x)
        attended = ragged.cross_attention(q, context.to(q.dtype), weight.to(q.dtype), self.heads, lengths)
        return self.out(attended + bias.chunk(2)[1].to(q.dtype))

    def _folded(self, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
        """Weight and bias of `kv`, with those of the norm before it: W (g x + h) + b = (W g) x + (W h + b)."""
        weight: Tensor = self.kv.weight
        bias: Tensor = self.kv.bias
        if norm is None:
            return weight, bias
        weight = weight * norm.weight
        return weight, torch.addmv(bias, self.kv.weight, norm.bias)

    def weights(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        """How much each position of x (B, T, D) attends to each of the context: (B, H, T, S), rows add up to 1."""
        q, k = _split_heads(self.q(x), self.heads), keys_values[0]
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)


class MLP(nn.Sequential):
    def __init__(self, width: int, ratio: float = 4.0, activation: type[nn.Module] = nn.GELU) -> None:
        hidden = int(width * ratio)
        super().__init__(Linear(width, hidden), activation(), Linear(hidden, width))


class SelfBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

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

    All blocks look at the same tokens, so these come here with mean 0 and variance 1 already (`normalize_once`): one
    tensor for all blocks instead of one that each block's backward pass would have to keep.
    """

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
            image: tokens (B, S, C) that passed `normalize_once`, or `keys_values` of them.
        """
        x = x + self.dropout(self._attend(self.norm_1(x), image, layout))
        return x + self.dropout(self.mlp(self.norm_2(x)))

    def _attend(self, x: Tensor, image: Tensor | KeysValues, layout: Layout | None) -> Tensor:
        if not isinstance(image, Tensor):
            return self.attention(x, image, layout)
        lengths = _lengths(layout)
        if lengths is not None and sum(lengths) < len(lengths) * self.attention.head_width:
            return self.attention.attend_without_kv(x, image, self.norm_context, lengths)
        return self.attention(x, self.keys_values(image), layout)

    def weights(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        return self.attention.weights(self.norm_1(x), keys_values)


def normalize_once(context: Tensor) -> Tensor:
    """(B, S, C) with mean 0 and variance 1 over C, in the type in which the layers that share it will multiply."""
    normed = F.layer_norm(context, context.shape[-1:])
    if torch.is_autocast_enabled(context.device.type):  # else every layer would make and keep a copy of its own
        normed = normed.to(torch.get_autocast_dtype(context.device.type))
    return normed


class AttentionalPooler(nn.Module):
    """Learned queries that attend to a sequence of any length and give back one token each: no residual, no MLP
    (CoCa, arXiv 2205.01917).
    """

    def __init__(self, context_width: int, width: int, queries: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, width))
        self.norm_query = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(context_width)
        self.attention = CrossAttention(width, context_width, heads)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, context: Tensor, queries: slice = slice(None)) -> Tensor:
        """context (B, S, C) -> (B, Q, E), for the given slice of the queries."""
        return self.norm_out(self.attention(*self._attended(context, queries)))

    def weights(self, context: Tensor, queries: slice = slice(None)) -> Tensor:
        """Where each query looks: (B, Q, S) over the context (B, S, C), the mean over heads; rows add up to 1."""
        return self.attention.weights(*self._attended(context, queries)).mean(dim=1)

    def _attended(self, context: Tensor, queries: slice) -> tuple[Tensor, KeysValues]:
        query = self.norm_query(self.query[queries]).expand(context.shape[0], -1, -1)  # (B, Q, E)
        return query, self.attention.keys_values(self.norm_context(context))


def _lengths(layout: Layout | None) -> list[int] | None:
    """Of the texts, if attention is to go text by text. A compiled graph would be one for these lengths alone."""
    return None if layout is None or torch.compiler.is_compiling() else layout.lengths


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without a mask. For the captions of an image while they are written, plain products on a CPU take from
    a quarter (one, in bf16) of the time of the fused kernel to as much (16, in fp32).
    """
    if is_inference(q) and q.shape[2] <= FEW_QUERIES:
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, T, D) -> (B, H, T, D/H)


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, H, T, D/H) -> (B, T, D)
