"""Scalars whose gradients are computed in the forward pass.

A loss that works in chunks has every logit at hand once, in the forward pass. Computing the gradients there means that
no logit is kept or recomputed for the backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def with_gradients(
    value: Tensor, gradients: Sequence[Tensor | None], inputs: Sequence[Tensor], once: bool = False
) -> Tensor:
    """`value` (a scalar) as a differentiable function of `inputs`, with the given gradients; None for an input without
    one.

    Args:
        once: allow one backward pass only, which works in the memory of `gradients`.
    """
    return _WithGradients.apply(value, once, len(inputs), *gradients, *inputs)


def wide(x: Tensor) -> Tensor:
    """In fp32, or unchanged in fp64: logits reach 100, where bf16 has steps of a half."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def wants_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, once: bool, count: int, *tensors: Tensor | None) -> Tensor:
        ctx.gradients = tensors[:count]
        ctx.once = once
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        times = Tensor.mul_ if ctx.once else Tensor.mul
        if ctx.once:
            del ctx.gradients
        known = [None if g is None else times(g, outer[0].to(g.dtype)) for g in gradients]
        return (None, None, None, *[None] * len(known), *known)
