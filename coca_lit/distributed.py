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
# How long ranks wait for objects of another one, which may be scoring or encoding alone. A rank that has died is
# noticed at once.
PATIENCE = timedelta(hours=12)


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
    highest = highest_over_ranks(x)
    return highest + sum_over_ranks((x - highest).exp()).log()


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of a tensor over ranks, without gradient."""
    return sum_over_ranks(x) / world_size()


def highest_over_ranks(x: Tensor) -> Tensor:
    """Maximum of a tensor over ranks, element by element, without gradient."""
    highest = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest


def max_over_ranks(numbers: Sequence[float]) -> list[float]:
    """The maximum of each number over ranks, the same on every rank."""
    return list(numbers) if world_size() == 1 else highest_over_ranks(_sendable(numbers)).tolist()


def totals_over_ranks(numbers: Sequence[int]) -> list[int]:
    """The sum of each number over ranks, the same on every rank."""
    return list(numbers) if world_size() == 1 else sum_over_ranks(_sendable(numbers)).tolist()


class Arriving:
    """Numbers of a device on their way to the host. `read` waits for their copy alone, and not for what was launched
    after it, so that reading the numbers of a step one step later waits for nothing.
    """

    def __init__(self, x: Tensor) -> None:
        self._numbers = x.detach().to("cpu", non_blocking=x.is_cuda)  # then in pinned memory
        self._event = torch.cuda.Event() if x.is_cuda else None
        if self._event is not None:
            self._event.record()

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.flatten().tolist()


class SteadyMax:
    """`max_over_ranks` once per step. On GPUs, which would stand still until the host knows the answer, it is the
    answer to the numbers of the step before.
    """

    def __init__(self) -> None:
        self._before: Arriving | None = None

    def __call__(self, numbers: Sequence[float]) -> list[float]:
        if world_size() == 1:
            return list(numbers)
        before, self._before = self._before, Arriving(highest_over_ranks(_sendable(numbers)))
        if dist.get_backend() != "nccl":
            return self._before.read()
        return before.read() if before is not None else [0.0] * len(numbers)


def gather_objects(x: T) -> list[T]:
    """One picklable object per rank, in rank order, on every rank."""
    if world_size() == 1:
        return [x]
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, x, group=_objects_group())
    return objects


def broadcast_object(x: T) -> T:
    """The object of rank 0, on every rank."""
    if world_size() == 1:
        return x
    box: list[Any] = [x]
    dist.broadcast_object_list(box, src=0, group=_objects_group())
    return box[0]


def print_rank_zero(message: str) -> None:
    """Prints a line on rank 0."""
    if rank() == 0:
        print(message, flush=True)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        everything = x.new_empty(world_size() * ctx.rows, *x.shape[1:])
        dist.all_gather_into_tensor(everything, x.contiguous())
        return everything

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        own = gradients[0].new_empty(ctx.rows, *gradients[0].shape[1:])
        dist.reduce_scatter_tensor(own, gradients[0].contiguous())
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


_patient: list[Any] = []  # the default group, and that of `_objects_group` which belongs to it


def _objects_group() -> Any:
    """All ranks, over the network and not over GPUs. Made at the first call, which all ranks make together."""
    default = dist.group.WORLD
    if not _patient or _patient[0] is not default:
        _patient[:] = default, dist.new_group(backend="gloo", timeout=PATIENCE)
    return _patient[1]


def _sendable(numbers: Sequence[float]) -> Tensor:
    """Numbers as a tensor where the process group takes tensors from: NCCL refuses host tensors."""
    dtype = torch.float32 if any(isinstance(x, float) for x in numbers) else torch.int64
    x = torch.tensor(numbers, dtype=dtype)
    if dist.get_backend() != "nccl":
        return x
    return x.pin_memory().to(torch.device("cuda", torch.cuda.current_device()), non_blocking=True)


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()
