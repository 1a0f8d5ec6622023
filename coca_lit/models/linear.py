"""The linear layer of everything but training. Writing captions on a CPU is reading its weights once per token, for a
few rows.

PyTorch's own way is slow for a handful of rows. In fp32 it gives them to MKL as the left factor; MKL is faster with the
weights there, and from a few rows on oneDNN is (error 8e-7 of the largest value), which brings the right factor into
the order of its registers in every call: that had better be the smaller one. In bf16 PyTorch takes oneDNN, and a copy
of the weights in oneDNN's order (`packed_weights`) saves half of the time. It takes half of the memory of fp32; in
fp32 the copy would not be worth its memory. In ms, for 75 million weights in matrices of the sizes of coca_ViT-B-32:

    rows                              1     2     4     8    16    48
    one core of an EPYC (Zen 4), without AMX
    fp32    F.linear                 25    48    41    45    59   108
            weights left, MKL        18*   18    28    44    62   115
            weights left, oneDNN     22    35    35    36    37    84
            weights right, oneDNN    21    29    33    38    49    92
    bf16    F.linear                 18    18    19    23    28    50
            weights left             29    29    29    30    31    50
            packed                   12    12    10    12    17    38
    one core of a Xeon with AMX
    fp32    F.linear                 24     -     -    57    52    71
            weights right, oneDNN    28     -     -    41    47    66
    bf16    F.linear                 22     -     -    24    25    32
            weights left             14     -     -    16    16    22

    * as two rows, the second of zeros; 26 as one
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MKL_ROWS = 4  # fp32: up to here MKL is faster than oneDNN
LEFT_ROWS = 16  # fp32: up to here the weights are the left factor


class Linear(nn.Linear):
    packed: Tensor | None = None  # the weights in oneDNN's order, see `packed_weights`

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out)"""
        if (packed := self.packed) is not None and x.dtype == torch.bfloat16 and _without_graph(x):
            return _onednn(x, packed, self.bias)
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; in fp32 on a CPU, as long as nothing learns, in the fastest way for so many rows."""
    whole = type(weight) in (Tensor, nn.Parameter)  # not one that is split over processes
    if not (whole and x.dtype == weight.dtype == torch.float32 and _without_graph(x) and x.numel()):
        return F.linear(x, weight, bias)
    if x.numel() // x.shape[-1] > LEFT_ROWS:
        return _onednn(x, weight, bias)
    return _weights_left(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)


@contextmanager
def packed_weights(*modules: nn.Module) -> Iterator[None]:
    """Inside, layers of these modules that are in bf16 on a CPU multiply by copies of their weights in oneDNN's order.
    Nothing may change the weights meanwhile.
    """
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, Linear)]
    try:
        for layer in layers:
            if _can_be_packed(layer.weight):
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
    out = out[:, :rows].T
    if bias is None:
        return out.contiguous()
    return torch.add(out, bias, out=x.new_empty(out.shape))


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # torch.set_float32_matmul_precision, the public way, lets oneDNN round fp32 to bf16; this does not.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _without_graph(x: Tensor) -> bool:
    return (
        x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and torch.backends.mkldnn.is_available()
    )


def _can_be_packed(weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_cpu and weight.dtype == torch.bfloat16
    return plain and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
