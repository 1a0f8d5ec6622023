"""The linear layer of the text side. Writing captions on a CPU is reading its weights once per token, for a few rows.

PyTorch sends fp32 products to MKL, which is slow for a handful of rows and on AMD altogether; oneDNN computes the same
in fp32 (error 8e-7 of the largest value). Measured on one core of a Xeon with coca_ViT-B-32, all products of a token:
8 rows 104 ms with MKL, 68 ms with oneDNN; 1 row 42 and 47 ms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENOUGH_ROWS = 4  # from here on oneDNN is faster


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out)"""
        if type(self.weight) is nn.Parameter and _onednn_is_faster(x):  # not for weights that are split over processes
            # Behind the public switch torch.set_float32_matmul_precision, oneDNN may round to bf16; this op does not.
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def _onednn_is_faster(x: Tensor) -> bool:
    return (
        x.dtype == torch.float32
        and x.is_cpu
        and x.numel() >= ENOUGH_ROWS * x.shape[-1]
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and torch.backends.mkldnn.is_available()
    )
