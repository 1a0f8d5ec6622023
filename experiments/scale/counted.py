"""Bytes that small trainings on gloo processes send and hold, beside the formulas of the study. Writes
communication.csv and memory.csv. Linux only: what the sockets sent is asked of the kernel.

OMP_NUM_THREADS=1 python experiments/scale/counted.py
"""

import os
import socket
import struct
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from traceback import walk_stack
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coca_lit import distributed
from coca_lit.data.batch import Batch
from coca_lit.models import CoCa, create_model
from coca_lit.tools.plan.estimate import Model, Recipe, measure, memory, per_sample
from coca_lit.tools.plan.trace import cost
from coca_lit.training.gradient_caching import cached_loss
from coca_lit.training.objectives import Captions, Contrastive, terms_of
from coca_lit.training.optim import AdamW
from coca_lit.training.sharding import shard
from experiments.scale.report import record
from experiments.scale.scale import ddp_bytes, feature_bytes, fsdp_bytes

ENGINES = ("DDP", "FSDP2", "gradient caching")
WEIGHTS = {"contrastive": 1.0, "caption": 2.0}
OBJECTIVES = (Contrastive(WEIGHTS["contrastive"]), Captions(WEIGHTS["caption"]))
PER_RANK, MICRO, TOKENS = 16, 4, 20
MODEL: dict[str, Any] = {
    "image_encoder": "vit_base_patch32_clip_224",
    "image_encoder_args": {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 2},
}
# Of every collective operation: the argument that holds the data of all ranks, and how many times a ring sends all but
# a rank's own part of it.
RING = {
    "c10d::allreduce_": (0, 2),
    "c10d::allgather_": (0, 1),
    "c10d::_allgather_base_": (0, 1),
    "c10d::reduce_scatter_": (1, 1),
    "c10d::_reduce_scatter_base_": (1, 1),
    "c10d::broadcast_": (0, 1),
}


class Sent(NamedTuple):
    """Bytes that a rank sends in a step, on average over ranks."""

    losses: float = 0.0  # features, their gradients, sums
    engine: float = 0.0  # weights and their gradients
    gloo: float = 0.0  # all of it as gloo does it, which reduces and scatters by reducing on all ranks
    sockets: float = 0.0  # what the kernel says


class Collectives(TorchDispatchMode):
    """Counts what a ring sends for the collective operations within the block; one that it does not know is an error.

    Operators on the way pass through Python here, also those that DDP and FSDP2 start within the backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = Sent()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name
            argument, times = RING[name]
            bytes_in_all = sum(x.nbytes for x in tree_leaves(args[argument]) if isinstance(x, Tensor))
            turn = (dist.get_world_size() - 1) / dist.get_world_size() * bytes_in_all
            ours = any(frame.f_code.co_filename == distributed.__file__ for frame, _ in walk_stack(None))
            losses, engine, gloo, _ = self.sent
            self.sent = Sent(
                losses + times * turn * ours,
                engine + times * turn * (not ours),
                gloo + (2 if "reduce" in name else 1) * turn,
            )
        return func(*args, **(kwargs or {}))


def sent_by_sockets() -> int:
    """Bytes that this process has sent over TCP through sockets that are open now."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as found:
                    total += _sent(found)
        except OSError:  # the listing itself was an open file
            continue
    return total


def _sent(connection: socket.socket) -> int:
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
        return 0
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 208)
    (sent,) = struct.unpack_from("<Q", info, 200)  # tcpi_bytes_sent of Linux's struct tcp_info
    return sent


class Step(nn.Module):
    """The losses of a batch as the forward pass, which is what DDP wraps."""

    def __init__(self, net: CoCa, micro_batch: int | None) -> None:
        super().__init__()
        self.net, self.micro_batch = net, micro_batch

    def forward(self, images: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        batch = Batch(images, tokens, lengths, [])
        if self.micro_batch is not None:
            return cached_loss(self.net, OBJECTIVES, batch, self.micro_batch)[0]
        return terms_of(self.net, OBJECTIVES, batch).weighted_sum(OBJECTIVES)


def prepared(engine: str) -> Callable[[], None]:
    """A training step on this rank."""
    torch.manual_seed(0)
    net = create_model("coca_tiny", **MODEL).train()
    step: nn.Module = Step(net, MICRO if engine == "gradient caching" else None)
    if engine == "FSDP2":
        shard(net, init_device_mesh("cpu", (dist.get_world_size(),)))
    else:
        step = DistributedDataParallel(step)
    optimizer = AdamW(lr=1e-3)(net)
    images = torch.zeros(PER_RANK, 3, net.image_size, net.image_size, dtype=torch.uint8)
    tokens = torch.randint(4, net.tokenizer.vocab_size, (PER_RANK, TOKENS))
    lengths = torch.full((PER_RANK,), TOKENS)

    def train() -> None:
        optimizer.zero_grad()
        step(images, tokens, lengths).backward()
        optimizer.step()

    return train


def count(engine: str) -> Sent:
    """What this rank sends in its third step; in the first two DDP arranges its buckets."""
    train = prepared(engine)
    train(), train()
    dist.barrier()
    before = sent_by_sockets()
    with Collectives() as collectives:
        train()
    dist.barrier()
    return collectives.sent._replace(sockets=sent_by_sockets() - before)


def peak(engine: str) -> int:
    """The most bytes of tensors that this rank holds at once, the network included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train = prepared(engine)
        train(), train()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def on_rank(rank: int, world: int, store: Path, function: Callable[[str], Any], engine: str) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=world)
    try:
        return function(engine)
    finally:
        dist.destroy_process_group()


def on_ranks(pool: ProcessPoolExecutor, world: int, function: Callable[[str], Any], engine: str) -> list[Any]:
    """No process of the pool takes two ranks, because each waits for all others."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        calls = [pool.submit(on_rank, rank, world, store, function, engine) for rank in range(world)]
        return [call.result() for call in calls]


def network() -> CoCa:
    with torch.device("meta"):
        return create_model("coca_tiny", **MODEL)


def formula(engine: str, model: Model, world: int) -> Sent:
    moved = ddp_bytes(model.trained, world)
    if engine == "FSDP2":
        moved = fsdp_bytes(model.weights, model.in_blocks, model.trained, world)
    return Sent(feature_bytes(PER_RANK, model.width, world), moved)


def communication_row(pool: ProcessPoolExecutor, engine: str, world: int) -> dict[str, Any]:
    expected, by_rank = formula(engine, measure(network()), world), on_ranks(pool, world, count, engine)
    found = Sent(*(sum(column) / world for column in zip(*by_rank, strict=True)))
    sent, said = found.losses + found.engine, expected.losses + expected.engine
    return {
        "engine": engine,
        "ranks": world,
        "features, formula": expected.losses,
        "features, counted": found.losses,
        "weights and gradients, formula": expected.engine,
        "weights and gradients, counted": found.engine,
        "formula above counted, %": 100 * (said - sent) / sent,
        "gloo, counted": found.gloo,
        "sockets of the kernel": found.sockets,
    }


def memory_row(pool: ProcessPoolExecutor, engine: str, world: int) -> dict[str, Any]:
    said, held = planned(engine, world), max(on_ranks(pool, world, peak, engine))
    return {
        "engine": engine,
        "ranks": world,
        "MB, formula": said / 1e6,
        "MB, held": held / 1e6,
        "formula above held, %": 100 * (said - held) / held,
    }


def planned(engine: str, world: int) -> float:
    """Bytes of a rank by the planner's formulas."""
    net = network()
    model, spent = measure(net), cost(net, WEIGHTS, TOKENS, None)
    micro = MICRO if engine == "gradient caching" else None
    recipe = Recipe(PER_RANK * world, world, sharded=engine == "FSDP2", micro_batch=micro, half=False)
    in_network, always = per_sample(model, spent, recipe, 3 * net.image_size**2)
    return sum(memory(model, spent, recipe).values()) + (micro or PER_RANK) * in_network + PER_RANK * always


def main() -> None:
    cases = [(engine, world) for engine in ENGINES for world in (2, 3)]
    with ProcessPoolExecutor(max(world for _, world in cases), get_context("spawn")) as pool:
        record("communication", [communication_row(pool, *case) for case in cases])
        record("memory", [memory_row(pool, *case) for case in cases])


if __name__ == "__main__":
    main()
