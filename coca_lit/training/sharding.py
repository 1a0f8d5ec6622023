"""Fully sharded data parallelism (FSDP2): every rank keeps a part of each weight, its gradient and optimizer state.

A block's weights are gathered when it is needed and dropped afterwards. What belongs to no block, the embeddings and
the vocabulary projection among it, is gathered once per step and stays until its gradients are known: the caption loss
uses it outside the network.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from coca_lit.models import CoCa


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy over all processes of the run, with checkpoints of one file, like those of any other run.

    Lightning would number the parameters in the optimizer's part of the file by their order in the module. Here it is
    that in the optimizer, which every other strategy uses, so that a run can go on under any of them.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # Lightning's "auto" is the number of nodes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = getattr(optimizer, "optimizer", optimizer).state_dict()  # Lightning wraps it
        whole = {i: {key: _whole(value) for key, value in values.items()} for i, values in state["state"].items()}
        return {"state": whole, "param_groups": state["param_groups"]}

    def load_checkpoint(self, checkpoint_path: str | PathLike[str], weights_only: bool | None = None) -> dict[str, Any]:
        assert self.model is not None
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = self.checkpoint_io.load_checkpoint(path, map_location="cpu", weights_only=weights_only)
        targets, tensors = self.model.state_dict(), checkpoint.pop("state_dict")
        self.model.load_state_dict({n: _part(t, targets[n]) if n in targets else t for n, t in tensors.items()})
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for i, values in state["state"].items():
                state["state"][i] = {key: _part(value, parameters[i]) for key, value in values.items()}
            optimizer.load_state_dict(state)
        return checkpoint


def _whole(x: Any) -> Any:
    return x.full_tensor().cpu() if isinstance(x, DTensor) else x


def _part(x: Any, like: Tensor) -> Any:
    """This rank's part of a tensor that belongs to `like` and is split as it is; anything else as it is. Every rank
    has read the whole tensor, so nothing is sent.
    """
    if not (isinstance(like, DTensor) and isinstance(x, Tensor) and x.shape == like.shape and x.ndim):
        return x
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shard(net: CoCa, mesh: DeviceMesh) -> None:
    """Shards the network over the ranks of a one-dimensional mesh, in place. Parameter names stay as they are."""
    for parameter in net.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP splits nothing else; convolutions are channels last
    for group in blocks(net):
        fully_shard(group, mesh=mesh)
    fully_shard(net, mesh=mesh)
    check_sharded(net)


def check_sharded(net: nn.Module) -> None:
    """Raises for a trainable tensor that is whole on every rank: nothing would ever average its gradients."""
    whole = [name for name, p in net.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if whole:
        raise RuntimeError(f"not sharded, so its gradient would differ between processes: {', '.join(whole)}")


@contextmanager
def unsharded(net: CoCa) -> Iterator[CoCa]:
    """The network with whole weights on every rank inside the block, for what does not go through `forward`:
    generation and encoding, once a batch has gone through it. Does nothing to a network that is not sharded.
    """
    parts = [module for module in net.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield net
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not net, recurse=False)
            part.reshard()


def blocks(net: CoCa) -> Iterator[list[nn.Module]]:
    """Modules that are gathered together. A cross block follows its self block and shares its group, because its keys
    and values are computed before it is called.
    """
    for name in ("blocks", "stages"):
        yield from ([block] for block in getattr(net.image_encoder.trunk, name, ()))
    yield from ([block] for block in net.text.blocks)
    if net.decoder is not None:
        yield from (list(pair) for pair in zip(net.decoder.self_blocks, net.decoder.cross_blocks, strict=True))
