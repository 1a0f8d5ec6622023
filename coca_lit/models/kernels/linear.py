"""Linear layers at inference on a CPU. Writing captions is reading their weights once per token, for a few rows.

In fp32 PyTorch gives MKL the weights as the right factor. Up to 4 rows MKL is faster with the weights left, unless
their rows are long. Otherwise oneDNN is faster (error 8e-7 of the largest value), up to 16 rows with the weights left:
in every call it brings the right factor into the order of its registers, and that had better be the smaller one. In
bf16 PyTorch takes oneDNN. A copy of the weights in oneDNN's order, made while captions are written (`packed_weights`),
halves the time and takes half of the memory of fp32 weights; a copy in fp32 would take more memory than it is worth.

In ms, for 75 million weights in matrices of the sizes of coca_ViT-B-32; ways that are taken nowhere are in brackets:

    rows                              1     2     4     8    16    48
    one core of an EPYC (Zen 4), without AMX
    fp32    (F.linear)               25    48    41    45    59   108
            weights left, MKL        18*   18    28    44    62   115
            weights left, oneDNN     22    35    35    36    37    84
            weights right, oneDNN    21    29    33    38    49    92
    bf16    (F.linear)               18    18    19    23    28    50
            (weights left)           29    29    29    30    31    50
            packed                   12    12    10    12    17    38
    one core of a Xeon with AMX, where only these were measured
    fp32    (F.linear)               24     -     -    57    52    71
            weights right, oneDNN    28     -     -    41    47    66
    bf16    (F.linear)               22     -     -    24    25    32
            (weights left)           14     -     -    16    16    22

    * as two rows, the second of zeros; 26 as one
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MKL_ROWS, MKL_WIDTH = 4, 1024  # fp32: up to here MKL is faster than oneDNN, with the weights left
LEFT_ROWS = 16  # fp32: from there up to here oneDNN is faster with the weights left


class Linear(nn.Linear):
    packed: Tensor | None = None  # the weights in oneDNN's order, see `packed_weights`

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out)"""
        if (packed := self.packed) is not None and x.dtype == torch.bfloat16 and is_inference(x):
            return _onednn(x, packed, self.bias)
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, in the fastest way for so many rows if this is inference on a CPU."""
    whole = type(weight) in (Tensor, nn.Parameter)  # not one that is split over processes
    if not (whole and x.dtype == weight.dtype and is_inference(x) and _onednn_takes(x.dtype) and x.numel()):
        return F.linear(x, weight, bias)
    width = x.shape[-1]
    rows = x.numel() // width
    if x.dtype == torch.float32 and rows <= LEFT_ROWS and (rows > MKL_ROWS or width <= MKL_WIDTH):
        return _weights_left(x.reshape(rows, width), weight, bias).view(*x.shape[:-1], -1)
    return _onednn(x, weight, bias)


@contextmanager
def packed_weights(*modules: nn.Module) -> Iterator[None]:
    """Inside, layers of these modules that are in bf16 on a CPU multiply by copies of their weights in oneDNN's order.
    Nothing may change the weights meanwhile. Blocks can be nested: the inner one takes the copies of the outer.
    """
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, Linear)]
    layers = [layer for layer in layers if layer.packed is None]
    try:
        for layer in layers:
            if layer.weight.is_cpu and layer.weight.dtype == torch.bfloat16 and _onednn_takes(torch.bfloat16):
                layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight)
        yield
    finally:
        for layer in layers:
            layer.packed = None


def _weights_left(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (R, in) -> (R, out)"""
    rows = len(x)
    if rows == 1:  # MKL reads the weights faster for two rows than for one
        x = F.pad(x, (0, 0, 0, 1))
    out = torch.mm(weight, x.T) if rows <= MKL_ROWS else _onednn(weight, x, None)  # (out, R)
    out = out.T[:rows]
    if bias is None:
        return out.contiguous()
    return torch.add(out, bias, out=x.new_empty(out.shape))


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # torch.set_float32_matmul_precision, the public way, lets oneDNN round fp32 to bf16; this does not.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_inference(x: Tensor) -> bool:
    """On a CPU, without gradients and in the types that the tensors have. Graphs keep to PyTorch's own ways."""
    return (
        x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    )
