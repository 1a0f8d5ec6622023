"""Linear layers at inference on a CPU: writing captions is reading their weights once per token, for a few rows.

fp32: PyTorch gives MKL the weights as the right factor. On an Intel processor nothing is faster up to 3 rows. On others
MKL is faster with the weights as the left factor, up to 4 rows, unless the weights' rows are long. Otherwise oneDNN is
faster (error 8e-7 of the largest value), up to 16 rows with the weights on the left: every call reorders the right
factor for the registers, so that should be the smaller one.

bf16: PyTorch takes oneDNN. A copy of the weights in oneDNN's order (`packed_weights`) halves the time and takes half of
the memory of fp32 weights. A copy in fp32 would take more memory than it is worth.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.models.kernels.process import enabled, on_intel

# Measured thresholds; experiments/benchmarks/cpu_linear.csv has them.
INTEL_ROWS = 3 if on_intel() else 0  # up to here MKL is faster than oneDNN on an Intel processor
MKL_ROWS, MKL_WIDTH = 4, 1024  # and on others, with the weights on the left
LEFT_ROWS = 16  # up to here oneDNN is faster with the weights on the left


class Linear(nn.Linear):
    packed: Tensor | None = None  # the weights in oneDNN's order, see `packed_weights`

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out)"""
        packed = self.packed
        if packed is not None and x.dtype == torch.bfloat16 and is_inference(x):
            return _onednn(x, packed, self.bias)
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, at inference on a CPU in the fastest way for this many rows."""
    unsharded = type(weight) in (Tensor, nn.Parameter)
    if not (unsharded and x.dtype == weight.dtype and is_inference(x) and _onednn_takes(x.dtype) and x.numel()):
        return F.linear(x, weight, bias)
    width = x.shape[-1]
    rows = x.numel() // width
    if x.dtype == torch.float32 and rows <= LEFT_ROWS:
        if rows <= INTEL_ROWS:
            return F.linear(x, weight, bias)
        by_mkl = rows <= MKL_ROWS and not INTEL_ROWS
        if not by_mkl or width <= MKL_WIDTH:
            return _weights_left(x.reshape(rows, width), weight, bias, by_mkl).view(*x.shape[:-1], -1)
    return _onednn(x, weight, bias)


@contextmanager
def packed_weights(*modules: nn.Module) -> Iterator[None]:
    """Inside, bf16 layers of these modules on a CPU multiply by copies of their weights in oneDNN's order.

    The weights must not change meanwhile. Blocks can be nested: the inner one uses the copies of the outer one.
    """
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, Linear)]
    layers = [layer for layer in layers if layer.packed is None]
    try:
        for layer in layers if enabled() else ():
            if layer.weight.is_cpu and layer.weight.dtype == torch.bfloat16 and _onednn_takes(torch.bfloat16):
                layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight)
        yield
    finally:
        for layer in layers:
            layer.packed = None


def is_inference(x: Tensor) -> bool:
    """Whether kernels for inference on a CPU apply: no gradients, no autocast, no graph that is being recorded."""
    return (
        enabled()
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    )


def _weights_left(x: Tensor, weight: Tensor, bias: Tensor | None, by_mkl: bool) -> Tensor:
    """x (R, in) -> (R, out)"""
    rows = len(x)
    if by_mkl and rows == 1:  # MKL reads the weights faster for two rows than for one
        x = F.pad(x, (0, 0, 0, 1))
    out = torch.mm(weight, x.T) if by_mkl else _onednn(weight, x, None)  # (out, R)
    out = out.T[:rows]
    if bias is None:
        return out.contiguous()
    return torch.add(out, bias, out=x.new_empty(out.shape))


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # torch.set_float32_matmul_precision, the public way, lets oneDNN round fp32 to bf16; this operator does not.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
