"""The linear layer of the text side. Writing captions on a CPU is reading its weights once per token, for a few rows.

PyTorch's own way is slow for a handful of rows. In fp32 it goes to MKL; oneDNN computes the same (error 8e-7 of the
largest value). In bf16 it packs the weights anew in every call; as the left factor they are read as they lie. In ms,
for 75 million weights in matrices of the sizes of coca_ViT-B-32, on one core of a Xeon with AMX:

    rows                     1     8    16    48
    fp32    F.linear        24    57    52    71
            oneDNN          28    41    47    66
    bf16    F.linear        22    24    25    32
            weights left    14    16    16    22
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENOUGH_ROWS = 4  # fp32: from here on oneDNN is faster
FEW_ROWS = 128  # bf16: up to here


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out)"""
        if type(self.weight) is nn.Parameter and _is_for_few_rows(x):  # not for weights that are split over processes
            rows = x.numel() // x.shape[-1]
            if x.dtype == torch.float32 and rows >= ENOUGH_ROWS:
                # torch.set_float32_matmul_precision, the public way, lets oneDNN round to bf16; this does not.
                return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            if x.dtype == self.weight.dtype == torch.bfloat16 and 0 < rows <= FEW_ROWS:
                return self._weights_left(x.reshape(rows, -1)).view(*x.shape[:-1], -1)
        return F.linear(x, self.weight, self.bias)

    def _weights_left(self, x: Tensor) -> Tensor:
        """x (R, in) -> (R, out)"""
        weight, bias = self.weight, self.bias
        if len(x) == 1:
            return (weight @ x[0] if bias is None else torch.addmv(bias, weight, x[0]))[None]
        out = weight @ x.T if bias is None else torch.addmm(bias[:, None], weight, x.T)  # (out, R)
        return out.T.contiguous()


def _is_for_few_rows(x: Tensor) -> bool:
    return (
        x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and torch.backends.mkldnn.is_available()
    )
