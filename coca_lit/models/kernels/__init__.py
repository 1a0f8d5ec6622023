"""Faster ways to compute what plain PyTorch computes, behind one door and one switch.

Model code calls the functions and layers exported here and knows nothing of what is behind them. Each has a fall-back
in plain PyTorch with the same result up to rounding; `enable(False)` switches everything to the fall-backs, and
`disabled()` does so within a block. Timings are in experiments/benchmarks/README.md.

- `Linear`, `linear`, `packed_weights`: matrix products of few rows at inference on a CPU.
- `attention`, `self_attention`, `cross_attention`: packed texts one by one, and few queries, on a CPU; packed texts
  without a grid on a GPU.
- `replace_timm_layers`: parts of timm's encoders that are slow on a CPU.
- `exact_fp32`: fp32 without TF32 on a GPU, where scores are compared.
- `keep_freed_memory`, `use_fp32_matmul`: settings of the whole process, for commands and not for a library.
"""

from coca_lit.models.kernels.cpu_linear import Linear, linear, packed_weights
from coca_lit.models.kernels.fast_attention import attention, cross_attention, self_attention
from coca_lit.models.kernels.process import (
    disabled,
    enable,
    enabled,
    exact_fp32,
    fp32_matmul,
    keep_freed_memory,
    use_fp32_matmul,
)
from coca_lit.models.kernels.timm_layers import replace_timm_layers

__all__ = [
    "Linear",
    "attention",
    "cross_attention",
    "disabled",
    "enable",
    "enabled",
    "exact_fp32",
    "fp32_matmul",
    "keep_freed_memory",
    "linear",
    "packed_weights",
    "replace_timm_layers",
    "self_attention",
    "use_fp32_matmul",
]
