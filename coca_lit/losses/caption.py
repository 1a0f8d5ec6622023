"""The caption loss in chunks, so that the logits of all tokens never exist at once.

Each chunk is projected to the vocabulary, its cross-entropy and gradients are computed, and its logits are dropped.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from coca_lit.distributed import sum_over_ranks, world_size
from coca_lit.losses.gradients import wants_gradient, wide, with_gradients
from coca_lit.models.coca import IGNORED_LABEL

# Logits in a chunk: of CLIP's vocabulary 340 tokens, 64 MiB in fp32; on a GPU, which needs more rows at a time to be
# busy, 2,700 tokens and 512 MiB.
CHUNK = 2**24
GPU_CHUNK = 2**27


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

    A mean per rank, averaged over ranks, would give more weight to tokens of ranks with short captions; here every
    token has the same weight.

    Args:
        hidden: (N, D) decoder states that predict a token; N may differ between ranks.
        vocabulary: (V, D) projection weight.
        labels: (N,) ids of the tokens to predict; -100 is ignored.
        count: divisor of the sum over all ranks; None for the number of their real tokens.
        chunk: tokens that are projected at a time; None for as many as fit `CHUNK`, on a GPU `GPU_CHUNK`.
        smoothing: share of the target that is spread over the whole vocabulary (Szegedy et al. 2016), as in
            `torch.nn.functional.cross_entropy`.
        weights: (N,) factor of each token; None for 1.

    Returns:
        A scalar in nats per token whose mean over ranks is the global loss.
    """
    if count is None:
        count = sum_over_ranks((labels != IGNORED_LABEL).sum())
    if chunk is None and len(hidden) <= hidden.shape[1]:
        # Fewer logits than the weight has elements: less memory than the weight gradient that chunks would keep.
        logits = wide(F.linear(hidden, vocabulary))
        losses = F.cross_entropy(
            logits, labels, reduction="none", ignore_index=IGNORED_LABEL, label_smoothing=smoothing
        )
        total = losses.sum() if weights is None else (losses * weights).sum()  # no dot product: autocast would round
    else:
        total = _chunked_sum(hidden, vocabulary, labels, chunk, smoothing, weights)
    return total * world_size() / count.clamp(min=1)


def _chunked_sum(
    hidden: Tensor, vocabulary: Tensor, labels: Tensor, chunk: int | None, smoothing: float, weights: Tensor | None
) -> Tensor:
    """Σ weight · cross-entropy. Products are in the precision of autocast, softmax and sums of gradients in fp32."""
    inputs = (hidden, vocabulary)
    needs_hidden, needs_vocabulary = map(wants_gradient, inputs)
    device = hidden.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_vocabulary = torch.zeros_like(vocabulary, dtype=total.dtype) if needs_vocabulary else None
    with torch.autocast(device, enabled=False), torch.no_grad():
        weight = vocabulary.to(precision)
        logits_at_once = CHUNK if hidden.is_cpu else GPU_CHUNK
        step = chunk or max(logits_at_once // len(vocabulary), 1)
        for begin in range(0, len(hidden), step):
            part = slice(begin, begin + step)
            states, targets = hidden[part].to(precision), labels[part]  # (chunk, D), (chunk,)
            logits = wide(F.linear(states, weight))  # (chunk, V)
            real = targets != IGNORED_LABEL
            picked = torch.where(real, targets, 0)[:, None]
            factor = real.to(logits.dtype) if weights is None else torch.where(real, weights[part].to(logits.dtype), 0)
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            chosen = logits.gather(1, picked)
            if smoothing:
                chosen = (1 - smoothing) * chosen + smoothing * logits.mean(dim=1, keepdim=True)
            total += ((log_sum - chosen)[:, 0] * factor).sum()
            if not (needs_hidden or needs_vocabulary):
                continue
            p = logits.sub_(log_sum.masked_fill_(~real[:, None], torch.inf)).exp_()  # zero where ignored
            p = p.scatter_add_(1, picked, (smoothing - 1) * real[:, None].to(p.dtype))
            if smoothing:
                p.sub_(smoothing / len(vocabulary))
            if smoothing or weights is not None:
                p.mul_(factor[:, None])
            p = p.to(precision)  # gradient of the logits
            if grad_hidden is not None:
                grad_hidden[part] = p @ weight
            if grad_vocabulary is not None:
                if p.dtype == grad_vocabulary.dtype:
                    grad_vocabulary.addmm_(p.T, states)
                else:
                    grad_vocabulary += p.T @ states
    if not (needs_hidden or needs_vocabulary):
        return total
    grad_vocabulary = None if grad_vocabulary is None else grad_vocabulary.to(vocabulary.dtype)
    return with_gradients(total, (grad_hidden, grad_vocabulary), inputs)
