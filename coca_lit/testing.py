"""What tests of an objective need, here and in a project of one's own: training steps on small batches, and processes
that train together.
"""

import os
import pickle
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from datetime import timedelta
from multiprocessing import get_context, set_start_method
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from coca_lit.data.batch import Batch
from coca_lit.distributed import rank, world_size
from coca_lit.lit_module import CoCaLit
from coca_lit.models import CoCa, create_model
from coca_lit.training.objectives import Objective
from coca_lit.training.optim import AdamW

PAIRS = 6  # of a batch of all ranks
ENCODER: dict[str, Any] = {  # a small image encoder without batch norms, with which micro-batches work
    "image_encoder": "vit_base_patch32_clip_224",
    "image_encoder_args": {"patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2},
}
LONGEST = 600  # seconds of a call on ranks
WAITING = timedelta(seconds=180)  # of a rank for the others


class Step(nn.Module):
    """The training step as the forward pass, which is what Lightning wraps in DistributedDataParallel."""

    def __init__(self, module: CoCaLit) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch) -> Tensor:
        return self.module.training_step(batch, 0)


def own_batch(model: CoCa, step: int) -> Batch:
    """This rank's part of six pairs with captions of very different lengths, others at every step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (PAIRS, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(4, model.tokenizer.vocab_size, (PAIRS, 20), generator=generator)
    lengths = torch.tensor([20, 12, 3, 5, 4, 9])
    tokens[torch.arange(20) >= lengths[:, None]] = model.tokenizer.pad_id
    own = _own_rows()
    return Batch(images[own], tokens[own, : int(lengths[own].max())], lengths[own], [""] * len(lengths[own]))


def with_further_captions(model: CoCa, step: int) -> Batch:
    """`own_batch` with two further captions of each image."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(4, model.tokenizer.vocab_size, (PAIRS, 2, 18), generator=generator)
    lengths = torch.randint(3, 19, (PAIRS, 2), generator=generator)
    tokens[torch.arange(18) >= lengths[..., None]] = model.tokenizer.pad_id
    own = _own_rows()
    return own_batch(model, step)._replace(extras={"further_tokens": tokens[own], "further_lengths": lengths[own]})


def _own_rows() -> slice:
    share = PAIRS // world_size()
    return slice(rank() * share, (rank() + 1) * share)


def trained_with(
    objective: Objective,
    batch: Callable[[CoCa, int], Batch],
    contrastive_weight: float,
    micro_batch_size: int | None,
    **network: Any,
) -> dict[str, Tensor]:
    """Weights after two steps with a further objective, on this rank's part of each batch, of a network with these
    arguments. They are the same on any number of ranks and in micro-batches if the objective is exact.
    """
    torch.manual_seed(0)
    net = create_model("coca_tiny", **ENCODER, **network).train()
    weights, objectives = (contrastive_weight, 2.0), {"further": objective}
    module = CoCaLit(net, AdamW(lr=0.0), 0, *weights, micro_batch_size=micro_batch_size, objectives=objectives)
    step: nn.Module = Step(module)
    if world_size() > 1:
        step = DistributedDataParallel(step)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for i in range(2):
        optimizer.zero_grad()
        step(batch(net, i)).backward()
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


def check_two_ranks_and_micro_batches(on_ranks: "Ranks", trained: Callable[..., dict[str, Tensor]]) -> None:
    """Raises AssertionError unless `trained(micro_batch_size, weight=…)`, a picklable function that calls
    `trained_with`, gives the same on two ranks and in micro-batches, and its weight counts.
    """
    expected = trained(None)
    unlike = trained(None, weight=0.1)
    assert any((value - unlike[name]).abs().max() > 1e-4 for name, value in expected.items())
    for found in [trained(2), *on_ranks(2, trained, None), *on_ranks(2, trained, 1)]:
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


class Ranks:
    """`ranks(world, function, *arguments)`: what a picklable function returns on each of `world` gloo processes.

    The processes live until the end of the `with` block, each call has a process group of its own. A process has the
    same rank in all of them: PyTorch remembers how large a rank's parts are by the mesh and not by the rank.

    Args:
        most: the largest `world`.
    """

    def __init__(self, most: int = 3) -> None:
        context = get_context("forkserver")
        # Workers of a rank are forked, as usual; else each rank would start a fork server of its own for them.
        self._pools = [ProcessPoolExecutor(1, context, initializer=_fork_workers) for _ in range(most)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in self._pools:
            pool.shutdown()

    def __call__(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        call = pickle.dumps((function, arguments))  # as bytes: tensors would otherwise travel as open files
        with TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            futures = [pool.submit(_on_rank, i, world, store, call) for i, pool in enumerate(self._pools[:world])]
            wait(futures, timeout=LONGEST, return_when=FIRST_EXCEPTION)
            failed = [future for future in futures if future.done() and future.exception()]
            if failed:  # the others wait for that one in vain, and must be free for the next call
                wait(futures, timeout=LONGEST)
            return [pickle.loads(future.result(timeout=LONGEST)) for future in [*failed, *futures]][len(failed) :]


def _fork_workers() -> None:
    # Not as an initializer itself: it is a method, which would arrive with a copy of what it changes.
    set_start_method("fork", force=True)


def _on_rank(rank: int, world: int, store: Path, call: bytes) -> bytes:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=world, timeout=WAITING)
    os.environ["RANK"] = str(rank)  # as torchrun does: who prepares a run folder asks before there is a group
    try:
        function, arguments = pickle.loads(call)
        return cast(bytes, pickle.dumps(function(*arguments)))
    finally:
        del os.environ["RANK"]
        dist.destroy_process_group()
