"""Fully sharded data parallelism (FSDP2), and sharded checkpoints.

Sharded, every rank keeps a part of each weight, its gradient and optimizer state. The weights of a block are gathered
when it runs and dropped afterwards. What belongs to no block, such as the embeddings and the vocabulary projection, is
gathered once per step and stays until its gradients are known: the caption loss uses it outside the network.

A sharded checkpoint is written in the background: every rank copies its part to the host, and a thread writes it. The
folder gets its name when all ranks have written their files and have read them again, so a kill or a full disk costs
this checkpoint alone. `coca_lit.weights.sharded` describes the folder.
"""

import io
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, async_save, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from coca_lit.distributed import broadcast_object, forked_rng, host_group, rank
from coca_lit.errors import CheckpointError, DataError
from coca_lit.files import TEMPORARY, atomic_write, durable_rename, remove, temporary_folder
from coca_lit.models import CoCa
from coca_lit.weights.kept import class_of, described_objectives
from coca_lit.weights.sharded import OPTIMIZERS, REST, SHARDS, STATE, facts, flat, is_folder, manifest, nested, sizes

log = logging.getLogger(__name__)


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy over all processes of the run.

    Lightning would number the parameters in the optimizer's part of a checkpoint by their order in the module. Here
    they are numbered by their order in the optimizer, as by every other strategy, so a run can resume under any.

    Args:
        sharded_checkpoints: a checkpoint is a folder, to which every process writes its part in the background,
            for models of billions of parameters; all machines must see the run folder. Otherwise one process gathers
            and writes one file, as under every other strategy.
    """

    def __init__(self, sharded_checkpoints: bool = False) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.sharded_checkpoints = sharded_checkpoints
        self.saving = Saving()

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # Lightning's "auto" is the number of nodes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = getattr(optimizer, "optimizer", optimizer).state_dict()  # Lightning wraps it
        if self.sharded_checkpoints:
            return {**state, "state": {i: dict(values) for i, values in state["state"].items()}}
        keep = self.is_global_zero  # who writes the file; the others take part and hold nothing
        whole = {i: {key: _whole(value, keep) for key, value in values.items()} for i, values in state["state"].items()}
        return {"state": whole, "param_groups": state["param_groups"]} if keep else {}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if not self.sharded_checkpoints:
            return super().lightning_module_state_dict()
        assert self.model is not None
        return self.model.state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | PathLike[str], storage_options: Any = None
    ) -> None:
        if self.sharded_checkpoints:
            self.saving.start(checkpoint, Path(filepath))
        else:
            Strategy.save_checkpoint(self, checkpoint, Path(filepath), storage_options)

    def load_checkpoint(self, checkpoint_path: str | PathLike[str], weights_only: bool | None = None) -> dict[str, Any]:
        assert self.model is not None
        path = Path(self.broadcast(checkpoint_path))
        if is_folder(path):
            checkpoint = restore(path, self.model, self.optimizers)
            self.saving.intact = path.resolve()
            for optimizer, state in zip(self.optimizers, checkpoint[OPTIMIZERS], strict=False):
                optimizer.load_state_dict(state)
            return checkpoint
        # Mapped: every rank reads its parts of the file, and the machine keeps one copy of it.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        targets = self.model.state_dict()
        tensors = checkpoint.pop("state_dict")
        self.model.load_state_dict({n: _part(t, targets[n]) if n in targets else t for n, t in tensors.items()})
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for i, values in state["state"].items():
                parts = {key: _part(value, parameters[i]) for key, value in values.items()}
                state["state"][i] = {key: x.clone() if isinstance(x, Tensor) else x for key, x in parts.items()}
            optimizer.load_state_dict(state)
        return checkpoint


def _whole(x: Any, keep: bool) -> Any:
    whole = x.full_tensor() if isinstance(x, DTensor) else x
    if not keep:
        return None
    return whole.cpu() if isinstance(whole, Tensor) else whole


def _part(x: Any, like: Tensor) -> Any:
    """This rank's part of a tensor that is split like the parameter `like`; anything else as it is. Every rank has read
    the whole tensor, so nothing is sent.
    """
    if not (isinstance(like, DTensor) and isinstance(x, Tensor) and x.shape == like.shape and x.ndim):
        return x
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shard(net: CoCa, mesh: DeviceMesh, half: bool = False) -> None:
    """Shards the network over the ranks of a one-dimensional mesh, in place. Parameter names stay as they are.

    Args:
        half: for mixed precision in bf16: the weights of blocks are gathered as the bf16 that they are used in, half
            the bytes, and their gradients are summed in fp32. What belongs to no block stays fp32: bf16 has three
            digits, too few for the temperature. For GPUs, where autocast computes norms in fp32.
    """
    # Inputs stay as they are: casting them would round the residual stream between blocks.
    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = bf16 if half else MixedPrecisionPolicy()
    for parameter in net.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP splits nothing else; convolutions are channels last
    for group in blocks(net):
        fully_shard(group, mesh=mesh, mp_policy=policy)
    fully_shard(net, mesh=mesh)
    register_fsdp_forward_method(net, "captions_of")  # which objectives call
    check_sharded(net)


def shard_objective(objective: nn.Module, mesh: DeviceMesh) -> None:
    """Shards the parameters of an objective over the ranks, in place, if it has any."""
    if any(True for _ in objective.parameters()):
        fully_shard(objective, mesh=mesh)
        check_sharded(objective)


def check_sharded(net: nn.Module) -> None:
    """Raises for a trainable tensor that is whole on every rank: nothing would ever average its gradients."""
    not_sharded = [name for name, p in net.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if not_sharded:
        raise RuntimeError(f"not sharded, so its gradient would differ between processes: {', '.join(not_sharded)}")


def unsharded(net: CoCa) -> CoCa:
    """A copy of a sharded network with whole fp32 weights on every rank, for generation and encoding, which do not go
    through `forward`. All ranks call it together.
    """
    with forked_rng(net.device), net.device:
        whole = CoCa(net.config)  # its initial values cost little there
    _copy_whole(net, whole)
    return whole.train(net.training)


def unsharded_objectives(objectives: nn.ModuleDict, net: CoCa) -> dict[str, nn.Module]:
    """Copies of those that are kept with the model, by name, with whole parameters on every rank. All ranks call it
    together.

    Args:
        net: with whole weights.
    """
    found: dict[str, nn.Module] = {}
    for name in described_objectives(objectives):
        sharded: Any = objectives[name]
        with forked_rng(net.device), net.device:
            whole = class_of(sharded).rebuilt(sharded.config)
            whole.build(net)
        _copy_whole(sharded, whole)
        found[name] = whole
    return found


def _copy_whole(sharded: nn.Module, whole: nn.Module) -> None:
    parts = sharded.state_dict()
    for name, tensor in whole.state_dict().items():
        part = parts[name]
        tensor.copy_(part.full_tensor() if isinstance(part, DTensor) else part)


def blocks(net: CoCa) -> Iterator[list[nn.Module]]:
    """Modules that are gathered together."""
    for name in ("blocks", "stages"):
        yield from ([block] for block in getattr(net.image_encoder.trunk, name, ()))
    yield from ([block] for block in net.text.blocks)
    if net.decoder is not None:
        yield from net.decoder.layers()


class Saving:
    """The checkpoint that is being written, at most one at a time.

    Attributes:
        intact: the last checkpoint that is known to be whole.
    """

    def __init__(self) -> None:
        self.intact: Path | None = None
        self._target = Path()
        self._written: Future[Any] | None = None

    def start(self, checkpoint: dict[str, Any], target: Path) -> None:
        """Copies the tensors of this rank to the host and returns; all ranks call it together. The tensors of a step
        stay what they are: a second checkpoint of the same step changes what is beside them.
        """
        self.finish()
        target = Path(broadcast_object(str(target)))
        tensors = flat(checkpoint)
        rest = io.BytesIO()
        torch.save(checkpoint, rest)
        if self.intact == target.resolve() and broadcast_object(is_folder(target)):
            if rank() == 0:
                _try_to_write(target, lambda: atomic_write(target / REST, rest.getvalue()))
            return
        writer = _Writer(target, rest.getvalue())
        self._target = target
        written = async_save(tensors, storage_writer=writer, process_group=host_group("checkpoints"))
        assert isinstance(written, Future)  # it returns something else for custom stagers only
        self._written = written

    def finish(self) -> None:
        """Waits until it is written. A rank that cannot write costs this checkpoint, as in
        `coca_lit.runs.checkpoint_io.save`.
        """
        written = self._written
        self._written = None
        if written is not None and _try_to_write(self._target, written.result):
            self.intact = self._target.resolve()


def _try_to_write(target: Path, write: Callable[[], Any]) -> bool:
    """Calls `write` and returns whether it succeeded. A disk that fails costs this checkpoint, not the run: rank 0
    warns and removes what was begun.
    """
    try:
        write()
        return True
    except (DataError, CheckpointException) as error:
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        if not all(isinstance(cause, OSError | DataError) for cause in causes):
            raise
        if rank() == 0:
            shutil.rmtree(temporary_folder(target), ignore_errors=True)
            reason = str(causes[0].__cause__ or causes[0]).splitlines()[0]
            log.warning("could not save %s: %s; training continues, and older checkpoints stay", target.name, reason)
        return False


class _Writer(HuggingFaceStorageWriter):
    """Writes tensors beside `target`, and makes them a checkpoint when all ranks are done."""

    def __init__(self, target: Path, rest: bytes) -> None:
        super().__init__(str(temporary_folder(target)), save_distributed=True)
        self._target = target
        self._rest = rest

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Reads again what was written, which the coordinator gets to know."""
        (Path(self.path) / TEMPORARY).touch()
        written = super().write_data(plan, planner).wait()
        known: dict[str, dict[str, int]] = {}
        for i, part in enumerate(written):
            name = part.storage_data.relative_path
            if name not in known:
                known[name] = facts(Path(self.path) / name)
            written[i] = replace(part, storage_data=(name, known[name]))
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(written)
        return future

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:
        """On the coordinator, after all ranks."""
        folder = Path(self.path)
        files = dict(part.storage_data for parts in results for part in parts)
        atomic_write(folder / SHARDS, manifest(files))
        atomic_write(folder / REST, self._rest)
        remove(self._target)  # of the same step: a damaged one, or a file from before the run was told to write folders
        (folder / TEMPORARY).unlink()
        durable_rename(folder, self._target)


def restore(folder: Path, model: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Any]:
    """Reads the parts of this rank, of however many ranks wrote them, and returns the content with them.

    Raises:
        CheckpointError: it is not whole, or belongs to another model.
    """
    content: dict[str, Any] = torch.load(folder / REST, map_location="cpu", weights_only=True)
    tensors: dict[str, Tensor] = {f"{STATE}.{name}": tensor for name, tensor in model.state_dict().items()}
    parameters = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    stored = sizes(folder)
    for name, about in stored.items():
        if name.startswith(f"{OPTIMIZERS}."):
            _, number, which, _ = name.split(".")
            like = parameters[int(number)][int(which)]
            dtype = about.properties.dtype
            is_split = about.size == like.shape and like.ndim
            tensors[name] = torch.zeros_like(like, dtype=dtype) if is_split else torch.zeros(about.size, dtype=dtype)
    differing = sorted(tensors.keys() ^ stored.keys())
    if differing:
        raise CheckpointError(f"{folder} is the checkpoint of another model: only one of them has {differing[0]}")
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=host_group("checkpoints"))
    return nested(content, tensors)
