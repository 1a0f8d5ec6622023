"""Attention of packed texts on a CPU, text by text, with gradients of its own.

A grid would pad every text to the longest, and the backward pass of PyTorch's fused CPU kernel is slow, above all in
bf16. Texts are short: their probabilities are small tensors, so plain products of one text after another are several
times as fast and need no grid. Measurements are in experiments/benchmarks/README.md.

Letters: N rows of all texts together, n rows of one text, H heads, W width of a head, S image tokens of width C.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd


def self_attention(qkv: Tensor, heads: int, lengths: Sequence[int], masks: Sequence[Tensor] | None) -> Tensor:
    """Attention within each text.

    Args:
        qkv: (N, 3·H·W), queries, keys and values.
        lengths: rows of each text.
        masks: for each text what is added to its scores, (n, n) or (1, n, n); None lets every row see all of its text.

    Returns:
        (N, H·W)
    """
    return _SelfAttention.apply(qkv.unflatten(1, (3, heads, -1)), lengths, masks).flatten(1)


def causal_masks(lengths: Sequence[int], allowed: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """What `self_attention` adds to the scores: 0 where a row may look, -inf elsewhere.

    Args:
        allowed: (B, 1, L, L), True where a row may look; None for the rows up to itself.
    """
    if allowed is not None:
        blocked = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)
        return [mask[:, :n, :n] for mask, n in zip(blocked, lengths, strict=True)]
    longest = max(lengths, default=0)
    blocked = torch.full((longest, longest), -torch.inf, dtype=dtype).triu(1)
    return [blocked[:n, :n] for n in lengths]


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, qkv: Tensor, lengths: Sequence[int], masks: Sequence[Tensor] | None) -> Tensor:
        """qkv (N, 3, H, W) -> (N, H, W)"""
        out, scale = torch.empty_like(qkv[:, 0]), qkv.shape[-1] ** -0.5
        kept = []
        for i, (rows, result) in enumerate(zip(qkv.split(lengths), out.split(lengths), strict=True)):
            q, k, v = rows.permute(1, 2, 0, 3)  # each (H, n, W)
            scores = torch.bmm(q, k.mT).mul_(scale)  # (H, n, n)
            p = _softmax(scores if masks is None else scores.add_(masks[i]))
            torch.bmm(p, v, out=result.transpose(0, 1))
            kept.append(p)
        ctx.save_for_backward(qkv, *kept)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor, None, None]:
        qkv, *kept = ctx.saved_tensors
        by_qkv = torch.empty_like(qkv)
        parts = (x.split(ctx.lengths) for x in (qkv, by_qkv, by_out))
        for p, rows, by_rows, by_result in zip(kept, *parts, strict=True):
            (q, k, v), by_result = rows.permute(1, 2, 0, 3), by_result.transpose(0, 1)  # each (H, n, W)
            by_q, by_k, by_v = by_rows.permute(1, 2, 0, 3)
            torch.bmm(p.mT, by_result, out=by_v)
            by_scores = _softmax_gradient(torch.bmm(by_result, v.mT), p).mul_(ctx.scale)  # (H, n, n)
            torch.bmm(by_scores, k, out=by_q)
            torch.bmm(by_scores.mT, q, out=by_k)
        return by_qkv, None, None


def cross_attention(q: Tensor, context: Tensor, kv: Tensor, heads: int, lengths: Sequence[int]) -> Tensor:
    """Attention of each text to the tokens of its image, whose keys and values are never made.

    A head's scores are q (X Kᵀ)ᵀ = (q K) Xᵀ and its output is P (X Vᵀ) = (P X) Vᵀ, with tokens X (S, C) and weights K,
    V (W, C). Moving the weights to the side of the text saves nearly all of their products while a text is shorter
    than a head is wide. A bias of the keys adds the same to all scores of a row, which softmax does not see; that of
    the values is the caller's to add, as the probabilities of a row add up to 1.

    Args:
        q: (N, H·W)
        context: (B, S, C), an image for each text.
        kv: (2·H·W, C), the weights of keys and values.
        lengths: rows of each text.

    Returns:
        (N, H·W)
    """
    return _CrossAttention.apply(
        q.unflatten(1, (heads, -1)), context, kv.unflatten(0, (2, heads, -1)), lengths
    ).flatten(1)


class _CrossAttention(torch.autograd.Function):
    """Keeps the probabilities alone. Queries and sums of image tokens, in the width of the image, are H times as large
    as the input, and made again in the backward pass for a few percent of its time.
    """

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, q: Tensor, context: Tensor, kv: Tensor, lengths: Sequence[int]) -> Tensor:
        """q (N, H, W), context (B, S, C), kv (2, H, W, C) -> (N, H, W)"""
        wide = _by_head(q * q.shape[2] ** -0.5, kv[0])  # (N, H, C)
        scores = q.new_empty(*q.shape[:2], context.shape[1])  # (N, H, S)
        for rows, tokens, result in zip(_texts(wide, lengths), context, _texts(scores, lengths), strict=True):
            torch.mm(rows, tokens.T, out=result)
        p = _softmax(scores)
        ctx.save_for_backward(q, context, kv, p)
        ctx.lengths = lengths
        return _by_head(_sums(p, context, lengths), kv[1].mT)

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, context, kv, p = ctx.saved_tensors
        lengths, scale = ctx.lengths, q.shape[2] ** -0.5
        by_kv, by_context = torch.empty_like(kv), torch.empty_like(context)
        _weight_gradient(by_out, _sums(p, context, lengths), by_kv[1])
        by_sums = _by_head(by_out, kv[1])  # (N, H, C)
        by_p = torch.empty_like(p)
        for rows, tokens, result in zip(_texts(by_sums, lengths), context, _texts(by_p, lengths), strict=True):
            torch.mm(rows, tokens.T, out=result)
        by_scores = _softmax_gradient(by_p, p)
        wide = _by_head(q * scale, kv[0])
        parts = (_texts(x, lengths) for x in (p, by_sums, by_scores, wide))
        for probabilities, sums, scores, queries, result in zip(*parts, by_context, strict=True):
            torch.mm(probabilities.T, sums, out=result).addmm_(scores.T, queries)
        by_wide = _sums(by_scores, context, lengths)
        _weight_gradient(q * scale, by_wide, by_kv[0])
        return _by_head(by_wide, kv[0].mT) * scale, by_context, by_kv, None


def _texts(x: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """(N, H, …) -> the rows of all heads of each text (n·H, …)."""
    return [rows.flatten(0, 1) for rows in x.split(lengths)]


def _sums(weights: Tensor, context: Tensor, lengths: Sequence[int]) -> Tensor:
    """Weighted sums of each image's tokens: (N, H, S), (B, S, C) -> (N, H, C)."""
    sums = weights.new_empty(*weights.shape[:2], context.shape[2])
    for rows, tokens, result in zip(_texts(weights, lengths), context, _texts(sums, lengths), strict=True):
        torch.mm(rows, tokens, out=result)
    return sums


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """(N, H, a) times a matrix for each head (H, a, b) -> (N, H, b)."""
    out = x.new_empty(*x.shape[:2], weight.shape[2])
    torch.bmm(x.transpose(0, 1), weight, out=out.transpose(0, 1))
    return out


def _weight_gradient(narrow: Tensor, wide: Tensor, out: Tensor) -> None:
    """(N, H, W), (N, H, C) -> out (H, W, C)"""
    torch.bmm(narrow.permute(1, 2, 0), wide.transpose(0, 1), out=out)


def _softmax(scores: Tensor) -> Tensor:
    return torch._softmax(scores, -1, False)  # in the type of the scores whatever autocast says; sums are in fp32


def _softmax_gradient(by_p: Tensor, p: Tensor) -> Tensor:
    return torch._softmax_backward_data(by_p, p, -1, p.dtype)
