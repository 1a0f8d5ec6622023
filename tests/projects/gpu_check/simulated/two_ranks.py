"""Two ranks that hold the same, on a simulated NCCL, which refuses tensors of the host."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from simulated_gpu import DeviceTensor
from torch import Tensor
from torch.nn.functional import normalize

GPU = torch.device("cuda", 0)


def check(*tensors: Tensor) -> None:
    for x in tensors:
        if not isinstance(x, DeviceTensor):
            raise RuntimeError("No backend type associated with device type cpu")


def all_reduce(x: Tensor, op: Any = dist.ReduceOp.SUM, **_: Any) -> None:
    check(x)
    if op == dist.ReduceOp.SUM:
        x.mul_(2)


def all_gather(out: Tensor, x: Tensor, **_: Any) -> SimpleNamespace:
    check(out, x)
    out.copy_(torch.cat([x, x]).view_as(out))
    return SimpleNamespace(wait=lambda: None)


def reduce_scatter(out: Tensor, x: Tensor, **_: Any) -> None:
    check(out, x)
    out.copy_(2 * x[: len(out)])


def answer_as_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[str, Any] = {"is_initialized": True, "get_world_size": 2, "get_rank": 0, "get_backend": "nccl"}
    for name, answer in answers.items():
        monkeypatch.setattr(dist, name, lambda *_, _answer=answer: _answer)
    collectives = {
        "all_reduce": all_reduce,
        "all_gather_into_tensor": all_gather,
        "reduce_scatter_tensor": reduce_scatter,
        "all_gather_single": all_gather,  # their names from PyTorch 2.13 on
        "reduce_scatter_single": reduce_scatter,
    }
    for name, function in collectives.items():
        monkeypatch.setattr(dist, name, function, raising=False)
    for name in ("all_gather", "reduce_scatter", "broadcast", "all_gather_object", "broadcast_object_list"):
        monkeypatch.setattr(dist, name, None)  # not to be called


def features(*shape: int) -> Tensor:
    return normalize(torch.randn(*shape), dim=-1).to(GPU).requires_grad_()
