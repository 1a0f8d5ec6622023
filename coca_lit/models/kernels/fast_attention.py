"""Attention of packed texts: on a CPU one text after another with gradients of their own, and few queries by plain
products; on a GPU by PyTorch's FlashAttention for texts of different lengths, which has not run on a GPU yet.

A grid would pad every text to the longest, and on a CPU the backward pass of PyTorch's fused kernel is slow, above all
in bf16. Texts are short: their probabilities are small tensors, so plain products of one text after another are several
times as fast and need no grid.

Letters: N rows of all texts together, n rows of one text, B texts, H heads, W width of a head, S image tokens of
width C.
"""

import importlib.util
import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd

from coca_lit.models.kernels.cpu_linear import is_inference, linear
from coca_lit.models.kernels.process import enabled
from coca_lit.models.packing import Layout

FEW_QUERIES = 16
VARLEN = "torch.nn.attention.varlen"


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention, each of q, k, v (B, H, T, W); the boolean mask, True where a key is seen, has four dimensions too.

    At inference on a CPU, plain products for few queries take from a quarter (one, in bf16) of the time of the fused
    kernel to as much (16, in fp32).
    """
    # In this order: a compiled graph must not depend on the number.
    if mask is None and is_inference(q) and q.shape[2] <= FEW_QUERIES:
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def self_attention(qkv: Tensor, heads: int, mask: Tensor | None = None, layout: Layout | None = None) -> Tensor:
    """Attention within each text.

    Args:
        qkv: queries, keys and values (B, T, 3·H·W), or rows (N, 3·H·W) if `layout` packs them.
        mask: (B, 1, T or 1, T), True where a row may attend; None for causal attention.

    Returns:
        (B, T, H·W), or (N, H·W)
    """
    lengths = _lengths_one_by_one(layout)
    if lengths is not None:
        return attend_text_by_text(qkv, heads, lengths, _additive_masks(lengths, mask, qkv.dtype))
    if layout is not None and mask is None and goes_without_grid(qkv, layout):
        return attend_within(qkv, heads, layout)
    qkv = qkv if layout is None else layout.unpack(qkv)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).transpose(1, 3).unbind(2)  # each (B, H, T, W)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2).flatten(2)
    return out if layout is None else layout.pack(out)


def cross_attention(
    q: Tensor, context: Tensor, weight: Tensor, bias: Tensor, heads: int, layout: Layout | None = None
) -> Tensor:
    """Attention of each text to the tokens of its image.

    Args:
        q: queries (B, T, H·W), or rows (N, H·W) if `layout` packs them.
        context: (B, S, C), an image for each text.
        weight, bias: (2·H·W, C) and (2·H·W,), of the layer that makes keys and values.

    Returns:
        The shape of q.
    """
    lengths = _lengths_one_by_one(layout)
    if lengths is not None and sum(lengths) < len(lengths) * (q.shape[-1] // heads):
        out = attend_without_kv(q, context.to(q.dtype), weight.to(q.dtype), heads, lengths)
        return out + bias.chunk(2)[1].to(q.dtype)
    kv = linear(context, weight, bias).unflatten(-1, (2, heads, -1))  # (B, S, 2, H, W)
    if layout is not None and goes_without_grid(q, layout):
        keys, values = kv.unbind(2)
        return attend_to_images(q.unflatten(-1, (heads, -1)), keys, values, layout)
    q = q if layout is None else layout.unpack(q)
    k, v = kv.transpose(1, 3).unbind(2)
    out = attention(q.unflatten(-1, (heads, -1)).transpose(1, 2), k, v).transpose(1, 2).flatten(2)
    return out if layout is None else layout.pack(out)


def _lengths_one_by_one(layout: Layout | None) -> list[int] | None:
    """Rows of each text if attention is to go text by text. A compiled graph would be one for these lengths alone."""
    return None if layout is None or not enabled() or torch.compiler.is_compiling() else layout.cpu_lengths


def attend_text_by_text(qkv: Tensor, heads: int, lengths: Sequence[int], masks: Sequence[Tensor] | None) -> Tensor:
    """Self-attention of packed texts: qkv (N, 3·H·W) -> (N, H·W).

    Args:
        masks: what is added to the scores of each text, (n, n) or (1, n, n); None lets every row attend to all of its
            text.
    """
    return _SelfAttention.apply(qkv.unflatten(1, (3, heads, -1)), lengths, masks).flatten(1)


def attend_without_kv(q: Tensor, context: Tensor, kv: Tensor, heads: int, lengths: Sequence[int]) -> Tensor:
    """Attention of packed texts to the tokens of their images without making keys and values: q (N, H·W) -> (N, H·W).

    A head's scores are q (X Kᵀ)ᵀ = (q K) Xᵀ and its output is P (X Vᵀ) = (P X) Vᵀ, with tokens X (S, C) and weights K,
    V (W, C). Moving the weights to the side of the text saves nearly all of their products while a text is shorter
    than a head is wide. A bias of the keys adds the same to all scores of a row, which softmax does not see; that of
    the values is left to the caller, as the probabilities of a row add up to 1.

    Args:
        context: (B, S, C), an image for each text.
        kv: (2·H·W, C), the weights of keys and values.
    """
    split = q.unflatten(1, (heads, -1)), context, kv.unflatten(0, (2, heads, -1))
    return _CrossAttention.apply(*split, lengths).flatten(1)


def _additive_masks(lengths: Sequence[int], allowed: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """What to add to the scores of each text: 0 where `allowed` (B, 1, T or 1, T), -inf elsewhere; causal for None."""
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
        out = torch.empty_like(qkv[:, 0])
        scale = qkv.shape[-1] ** -0.5
        kept = []
        for i, (rows, result) in enumerate(zip(qkv.split(lengths), out.split(lengths), strict=True)):
            q, k, v = rows.permute(1, 2, 0, 3)  # each (H, n, W)
            scores = torch.bmm(q, k.mT).mul_(scale)  # (H, n, n)
            p = _softmax(scores if masks is None else scores.add_(masks[i]))
            torch.bmm(p, v, out=result.transpose(0, 1))
            kept.append(p)
        ctx.save_for_backward(qkv, *kept)
        ctx.lengths = lengths
        ctx.scale = scale
        return out

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        qkv, *kept = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv)
        texts = (x.split(ctx.lengths) for x in (qkv, grad_qkv, grad_out))
        for p, rows, grad_rows, grad_result in zip(kept, *texts, strict=True):
            (q, k, v), grad_attended = rows.permute(1, 2, 0, 3), grad_result.transpose(0, 1)  # each (H, n, W)
            grad_q, grad_k, grad_v = grad_rows.permute(1, 2, 0, 3)
            torch.bmm(p.mT, grad_attended, out=grad_v)
            grad_scores = _softmax_gradient(torch.bmm(grad_attended, v.mT), p).mul_(ctx.scale)  # (H, n, n)
            torch.bmm(grad_scores, k, out=grad_q)
            torch.bmm(grad_scores.mT, q, out=grad_k)
        return grad_qkv, None, None


class _CrossAttention(torch.autograd.Function):
    """Keeps the probabilities alone. Queries and sums of image tokens, in the width of the image, are H times as large
    as the input, and the backward pass recomputes them for a few percent of its time.
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
        return _by_head(_weighted_sums(p, context, lengths), kv[1].mT)

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, context, kv, p = ctx.saved_tensors
        lengths = ctx.lengths
        scale = q.shape[2] ** -0.5
        grad_kv = torch.empty_like(kv)
        grad_context = torch.empty_like(context)
        _weight_gradient(grad_out, _weighted_sums(p, context, lengths), grad_kv[1])
        grad_sums = _by_head(grad_out, kv[1])  # (N, H, C)
        grad_p = torch.empty_like(p)
        for rows, tokens, result in zip(_texts(grad_sums, lengths), context, _texts(grad_p, lengths), strict=True):
            torch.mm(rows, tokens.T, out=result)
        grad_scores = _softmax_gradient(grad_p, p)
        wide = _by_head(q * scale, kv[0])
        texts = (_texts(x, lengths) for x in (p, grad_sums, grad_scores, wide))
        for probabilities, sums, scores, queries, result in zip(*texts, grad_context, strict=True):
            torch.mm(probabilities.T, sums, out=result).addmm_(scores.T, queries)
        grad_wide = _weighted_sums(grad_scores, context, lengths)
        _weight_gradient(q * scale, grad_wide, grad_kv[0])
        return _by_head(grad_wide, kv[0].mT) * scale, grad_context, grad_kv, None


def _texts(x: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """(N, H, …) -> the rows of all heads of each text (n·H, …)."""
    return [rows.flatten(0, 1) for rows in x.split(lengths)]


def _weighted_sums(weights: Tensor, context: Tensor, lengths: Sequence[int]) -> Tensor:
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
    return torch._softmax(scores, -1, False)  # in the type of the scores, whatever autocast says; it sums in fp32


def _softmax_gradient(grad_p: Tensor, p: Tensor) -> Tensor:
    return torch._softmax_backward_data(grad_p, p, -1, p.dtype)


# On a GPU


def goes_without_grid(x: Tensor, layout: Layout) -> bool:
    """Whether the kernel takes these rows: packed, in half precision, on a GPU from Ampere on."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return layout.packed and half and x.is_cuda and enabled() and _is_available(x.device.index)


@cache
def _is_available(device: int) -> bool:
    if torch.cuda.get_device_capability(device) < (8, 0) or importlib.util.find_spec(VARLEN) is None:
        return False
    return "window_size" in inspect.signature(_kernel()).parameters  # earlier versions say `is_causal`


def _kernel() -> Any:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def attend_within(qkv: Tensor, heads: int, layout: Layout) -> Tensor:
    """Causal attention within each text: qkv (N, 3·H·W) -> (N, H·W)."""
    q, k, v = qkv.unflatten(1, (3, heads, -1)).unbind(1)  # each (N, H, W)
    ends = layout.ends
    longest = layout.max_length
    return _kernel()(q, k, v, ends, ends, longest, longest, window_size=(-1, 0)).flatten(1)


def attend_to_images(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Attention of each text to the tokens of its image: q (N, H, W), k, v (B, S, H, W) -> (N, H·W)."""
    tokens = k.shape[1]
    ends = torch.arange(0, (len(k) + 1) * tokens, tokens, dtype=torch.int32, device=k.device)
    out = _kernel()(q, k.flatten(0, 1), v.flatten(0, 1), layout.ends, ends, layout.max_length, tokens)
    return out.flatten(1)
