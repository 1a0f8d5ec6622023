"""Attention of packed texts on a GPU without a grid, by PyTorch's FlashAttention for texts of different lengths. Not
run on a GPU yet.

Letters: N rows of all texts together, B texts, H heads, W width of a head, S image tokens.
"""

import importlib.util
import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from coca_lit.models.kernels.process import enabled
from coca_lit.models.packing import Layout

MODULE = "torch.nn.attention.varlen"


def goes_without_grid(x: Tensor, layout: Layout | None) -> bool:
    """Whether the kernel takes these rows: packed, in half precision, on a GPU from Ampere on."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return layout is not None and layout.packed and half and x.is_cuda and enabled() and _is_available(x.device.index)


@cache
def _is_available(device: int) -> bool:
    if torch.cuda.get_device_capability(device) < (8, 0) or importlib.util.find_spec(MODULE) is None:
        return False
    return "window_size" in inspect.signature(_kernel()).parameters  # earlier versions say `is_causal`


def _kernel() -> Any:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def attend_within(qkv: Tensor, heads: int, layout: Layout) -> Tensor:
    """Causal attention within each text: qkv (N, 3·H·W) -> (N, H·W)."""
    q, k, v = qkv.unflatten(1, (3, heads, -1)).unbind(1)  # each (N, H, W)
    ends, longest = layout.ends(), layout.max_length
    return _kernel()(q, k, v, ends, ends, longest, longest, window_size=(-1, 0)).flatten(1)


def attend_to_images(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Attention of each text to the tokens of its image: q (N, H, W), k, v (B, S, H, W) -> (N, H·W)."""
    tokens = k.shape[1]
    ends = torch.arange(0, (len(k) + 1) * tokens, tokens, dtype=torch.int32, device=k.device)
    out = _kernel()(q, k.flatten(0, 1), v.flatten(0, 1), layout.ends(), ends, layout.max_length, tokens)
    return out.flatten(1)
