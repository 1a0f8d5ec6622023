"""The caption loss, in chunks: at no time do the logits of more than some tokens exist.

A chunk is projected to the vocabulary, its cross-entropy and gradients are formed, and its logits are dropped. On a
GPU with the extra `kernels` installed, a fused kernel of liger-kernel does the same; that path has not been run on a
GPU yet.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from coca_lit.distributed import sum_over_ranks, world_size
from coca_lit.losses.gradients import wants_gradient, wide, with_gradients

CHUNK = 2**24  # logits in a chunk, 64 MiB in fp32: 340 tokens of CLIP's vocabulary
IGNORED = -100


def caption_loss(
    hidden: Tensor,
    vocabulary: Tensor,
    labels: Tensor,
    count: Tensor | None = None,
    chunk: int | None = None,
    smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the next token, averaged over all real tokens of the global batch.

    A mean per rank, averaged over ranks, would weigh tokens of ranks with short captions more; here every token
    counts the same.

    Args:
        hidden: (N, D) decoder states that predict a token; N may differ between ranks.
        vocabulary: (V, D) projection weight.
        labels: (N,) ids of the tokens to predict; -100 is ignored.
        count: what to divide the sum by, of all ranks; the number of their real tokens if not given.
        chunk: tokens that are projected at a time; as many as fit `CHUNK` if not given.
        smoothing: share of the target that is spread over the whole vocabulary (Szegedy et al. 2016), as in
            `torch.nn.functional.cross_entropy`.
        weights: (N,) factor of each token; all 1 if not given.

    Returns:
        A scalar in nats per token whose mean over ranks is the global loss.
    """
    if count is None:
        count = sum_over_ranks((labels != IGNORED).sum())
    if _has_kernel(hidden) and weights is None:
        total = _kernel(hidden, vocabulary, labels, smoothing)
    elif chunk is None and len(hidden) <= hidden.shape[1]:
        # Fewer logits than the weight has elements: less than the gradient that chunks hold from the forward pass on.
        logits = wide(F.linear(hidden, vocabulary))
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED, label_smoothing=smoothing)
        total = losses.sum() if weights is None else (losses * weights).sum()  # no product, which autocast would round
    else:
        total = _sum(hidden, vocabulary, labels, chunk, smoothing, weights)
    return total * world_size() / count.clamp(min=1)


def _sum(
    hidden: Tensor, vocabulary: Tensor, labels: Tensor, chunk: int | None, smoothing: float, weights: Tensor | None
) -> Tensor:
    """Σ weight · cross-entropy. Products are in the precision of autocast, softmax and sums of gradients in fp32."""
    inputs = (hidden, vocabulary)
    for_hidden, for_vocabulary = map(wants_gradient, inputs)
    device = hidden.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    grad_hidden = torch.empty_like(hidden) if for_hidden else None
    grad_vocabulary = torch.zeros_like(vocabulary, dtype=total.dtype) if for_vocabulary else None
    with torch.autocast(device, enabled=False), torch.no_grad():
        weight, step = vocabulary.to(precision), chunk or max(CHUNK // len(vocabulary), 1)
        for begin in range(0, len(hidden), step):
            part = slice(begin, begin + step)
            states, targets = hidden[part].to(precision), labels[part]  # (chunk, D), (chunk,)
            logits = wide(F.linear(states, weight))  # (chunk, V)
            real = targets != IGNORED
            picked = torch.where(real, targets, 0)[:, None]
            factor = real.to(logits.dtype) if weights is None else torch.where(real, weights[part].to(logits.dtype), 0)
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            chosen = logits.gather(1, picked)
            if smoothing:
                chosen = (1 - smoothing) * chosen + smoothing * logits.mean(dim=1, keepdim=True)
            total += ((log_sum - chosen)[:, 0] * factor).sum()
            if not (for_hidden or for_vocabulary):
                continue
            p = logits.sub_(log_sum.masked_fill_(~real[:, None], torch.inf)).exp_()  # zero where ignored
            p = p.scatter_add_(1, picked, (smoothing - 1) * real[:, None].to(p.dtype))
            if smoothing:
                p.sub_(smoothing / len(vocabulary))
            if smoothing or weights is not None:
                p.mul_(factor[:, None])
            p = p.to(precision)  # gradient by the logits
            if grad_hidden is not None:
                grad_hidden[part] = p @ weight
            if grad_vocabulary is not None:
                _add_product(grad_vocabulary, p, states)
    if not (for_hidden or for_vocabulary):
        return total
    grad_vocabulary = None if grad_vocabulary is None else grad_vocabulary.to(vocabulary.dtype)
    return with_gradients(total, (grad_hidden, grad_vocabulary), inputs)


def _add_product(total: Tensor, p: Tensor, states: Tensor) -> None:
    """total (V, D) += pᵀ (V, chunk) states (chunk, D)"""
    if p.dtype == total.dtype:
        total.addmm_(p.T, states)
    else:
        total += p.T @ states


def _has_kernel(hidden: Tensor) -> bool:
    return hidden.is_cuda and importlib.util.find_spec("liger_kernel") is not None


def _kernel(hidden: Tensor, vocabulary: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    device = hidden.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    states, weight = hidden.to(precision), vocabulary.to(precision)
    return liger_fused_linear_cross_entropy(
        states,
        weight,
        labels,
        ignore_index=IGNORED,
        label_smoothing=smoothing,
        reduction="sum",
        accum_dtype=torch.float32,
    )
