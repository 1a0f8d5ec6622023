"""Every collective operation of the project, and seeds, so that a result does not depend on the number of processes.
Without a process group all collectives act as on a single process.

Gradients: DDP averages gradients over ranks, `gather` and `sum_over_ranks` sum them in the backward pass. For losses
whose mean over ranks is the loss of the global batch the two factors cancel, and the result is the gradient of one
process with the whole batch:

    rank 0:  x0 ─┐          ┌─ [x0 x1] ─ loss    backward of gather: rank 0 gets the sum of both ranks' gradients
    rank 1:  x1 ─┴─ gather ─┴─ [x0 x1] ─ loss    for x0, rank 1 that for x1; DDP then divides by 2
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from coca_lit.machine import best_device, is_first_process

T = TypeVar("T")
# How long ranks wait for objects of another one, which may be scoring or encoding alone. A rank that has died is
# noticed at once.
PATIENCE = timedelta(hours=12)
_patience = PATIENCE  # at least; a command whose processes have uneven work asks for more
_patient: dict[str, Any] = {}  # by purpose, and under "" the default group that they belong to


def world_size() -> int:
    return dist.get_world_size() if _active() else 1


def rank() -> int:
    return dist.get_rank() if _active() else 0


@contextmanager
def process_group(timeout: timedelta | None = None) -> Iterator[torch.device]:
    """Yields the device of this process. Inside the block there is a process group if torchrun started the process;
    several processes compute on CUDA or on the CPU. Training leaves this to Lightning.

    Args:
        timeout: how long a process waits for the others; default 10 (GPU) or 30 minutes.
    """
    cuda = torch.cuda.is_available()
    global _patience
    _patience = max(PATIENCE, timeout or PATIENCE)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    device = torch.device(best_device() if alone else "cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if alone:
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


def highest_over_ranks(x: Tensor) -> Tensor:
    """Maximum of a tensor over several ranks, element by element, without gradient."""
    highest = x.detach().clone()
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


class StepExchange:
    """What all ranks have to know of every step, in one collective: numbers from the host and numbers on the device.
    A GPU would idle until the host has read the result, so on GPUs the host reads the result of the step before.

    In each step, in this order: `Checkpoints` calls `tell` (stop? save? best?) before the optimizer step,
    `NonFiniteGuard` calls `exchange` with its numbers of the device, and `Checkpoints` calls `heard` when the next
    batch begins. Without a guard, `heard` exchanges the told numbers itself.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Discards numbers that were reported but not yet read."""
        self._told: list[float] = []
        self._arriving: deque[Arriving] = deque()

    def tell(self, numbers: Sequence[float]) -> None:
        """Numbers of this rank that go with the next exchange."""
        self._told = [float(number) for number in numbers]

    def exchange(self, of_rank: Tensor) -> Tensor:
        """Numbers (k,) of this rank, fp32 -> the numbers of all ranks (W, k), on the same device."""
        if world_size() == 1:
            return of_rank[None]
        numbers = torch.cat([of_rank, _sendable(self._told)])  # (k + told,)
        everything = numbers.new_empty(world_size() * len(numbers))
        _all_gather(everything, numbers)
        everything = everything.view(world_size(), len(numbers))
        if self._told:
            self._arriving.append(Arriving(everything[:, len(of_rank) :].amax(dim=0)))
        self._told = []
        return everything[:, : len(of_rank)]

    def heard(self) -> list[float]:
        """The maximum over ranks of each number that was told, the same on every rank; nothing if none has arrived."""
        if world_size() == 1:
            return self._told
        if self._told:  # no guard has exchanged them
            self.exchange(_sendable([]))
        under_way = 1 if dist.get_backend() == "nccl" else 0
        return self._arriving.popleft().read() if len(self._arriving) > under_way else []


step_exchange = StepExchange()  # of this process, as its process group is


def gather_objects(x: T) -> list[T]:
    """One picklable object per rank, in rank order, on every rank."""
    if world_size() == 1:
        return [x]
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, x, group=host_group("objects"))
    return objects


def broadcast_object(x: T) -> T:
    """The object of rank 0, on every rank."""
    if world_size() == 1:
        return x
    box: list[Any] = [x]
    dist.broadcast_object_list(box, src=0, group=host_group("objects"))
    return box[0]


def host_group(purpose: str) -> Any:
    """All ranks, over the network and not over GPUs. A thread that talks to other ranks needs a group for itself, hence
    one for each purpose; made at the first call, which all ranks make together.
    """
    default = dist.group.WORLD
    if _patient.get("") is not default:
        _patient.clear()
        _patient[""] = default
    if purpose not in _patient:
        _patient[purpose] = dist.new_group(backend="gloo", timeout=_patience)
    return _patient[purpose]


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed from its purpose, any parts, so that randomness depends neither on workers nor on where a run was
    resumed. It is equal in every process (Python's `hash` of a string is not).
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """Random numbers of the CPU and of `device`, the current one of its kind, go on after the block as before it."""
    kind = torch.get_device_module(device) if device.type not in ("cpu", "meta") else None
    before = kind.get_rng_state() if kind is not None else None
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        if kind is not None:
            kind.set_rng_state(before)


def print_rank_zero(message: str) -> None:
    """Prints a line on rank 0. Before there is a process group, the environment tells which process that will be."""
    if rank() == 0 if _active() else is_first_process():
        print(message, flush=True)


def _all_gather(gathered: Tensor, x: Tensor) -> None:
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before PyTorch 2.13
    function(gathered, x)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        everything = x.new_empty(world_size() * ctx.rows, *x.shape[1:])
        _all_gather(everything, x.contiguous())
        return everything

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        own = gradients[0].new_empty(ctx.rows, *gradients[0].shape[1:])
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(own, gradients[0].contiguous())
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


def _sendable(numbers: Sequence[float]) -> Tensor:
    """Numbers as a tensor where the process group takes tensors from: NCCL refuses host tensors."""
    dtype = torch.int64 if numbers and all(isinstance(x, int) for x in numbers) else torch.float32
    x = torch.tensor(numbers, dtype=dtype)
    if dist.get_backend() != "nccl":
        return x
    return x.pin_memory().to(torch.device("cuda", torch.cuda.current_device()), non_blocking=True)


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()
