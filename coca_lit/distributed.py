"""Every collective operation of the project. Without a process group all of them act as on a single process.

Gradients: DDP averages gradients over ranks, `gather` and `sum_over_ranks` sum them in the backward pass. For losses
whose mean over ranks is the loss of the global batch the two factors cancel, and the result is the gradient of one
process with the whole batch:

    rank 0:  x0 ─┐          ┌─ [x0 x1] ─ loss        backward of gather: the gradients of both ranks for x0 are added
    on rank 0, rank 1:  x1 ─┴─ gather ─┴─ [x0 x1] ─ loss        DDP then divides by 2
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if _active() else 1


def rank() -> int:
    return dist.get_rank() if _active() else 0


@contextmanager
def process_group(timeout: timedelta | None = None) -> Iterator[torch.device]:
    """Yields the device of this process. Inside the block there is a process group if torchrun started the process.
    Training leaves this to Lightning.

    Args:
        timeout: how long a process waits for the others; default 10 (GPU) or 30 minutes.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def gather(x: Tensor) -> Tensor:
    """Rows (B, …) of all ranks, stacked in rank order (W·B, …), with gradient. All ranks must pass the same shape."""
    return _Gather.apply(x) if world_size() > 1 else x


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of a tensor over ranks, with gradient."""
    return _Sum.apply(x) if world_size() > 1 else x


def logsumexp_over_ranks(x: Tensor) -> Tensor:
    """log Σ exp of a tensor over ranks, element by element, without gradient."""
    if world_size() == 1:
        return x
    highest = x.detach().clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest + sum_over_ranks((x - highest).exp()).log()


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of a tensor over ranks, without gradient."""
    return sum_over_ranks(x) / world_size()


def max_over_ranks(numbers: Sequence[float]) -> list[float]:
    """The maximum of each number over ranks, the same on every rank."""
    if world_size() == 1:
        return list(numbers)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    x = torch.tensor(numbers, dtype=torch.float32, device=device)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.tolist()


def gather_objects(x: T) -> list[T]:
    """One picklable object per rank, in rank order, on every rank."""
    if world_size() == 1:
        return [x]
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, x)
    return objects


def broadcast_object(x: T) -> T:
    """The object of rank 0, on every rank."""
    if world_size() == 1:
        return x
    box: list[Any] = [x]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def print_rank_zero(message: str) -> None:
    """Prints a line on rank 0."""
    if rank() == 0:
        print(message, flush=True)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        own = gradients[0].new_empty(ctx.rows, *gradients[0].shape[1:])
        dist.reduce_scatter(own, [part.contiguous() for part in gradients[0].chunk(world_size())])
        return own


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()
