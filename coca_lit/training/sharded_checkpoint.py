"""Sharded checkpoints, written in the background: every rank copies its part to the host, and a thread writes it.

A folder gets its name when all ranks have written their files and have read them again, so a kill or a full disk costs
this checkpoint alone. `coca_lit.weights.sharded` describes the folder.
"""

import io
import logging
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, async_save, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from coca_lit.distributed import broadcast_object, host_group, rank
from coca_lit.errors import CheckpointError, DataError
from coca_lit.files import TEMPORARY, atomic_write, durable_rename, remove, temporary_folder
from coca_lit.weights.sharded import OPTIMIZERS, REST, SHARDS, STATE, facts, flat, is_folder, manifest, nested, sizes

log = logging.getLogger(__name__)


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
        tensors, rest = flat(checkpoint), io.BytesIO()
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
        written, self._written = self._written, None
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
        self._target, self._rest = target, rest

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
            like, dtype = parameters[int(number)][int(which)], about.properties.dtype
            whole = about.size == like.shape and like.ndim
            tensors[name] = torch.zeros_like(like, dtype=dtype) if whole else torch.zeros(about.size, dtype=dtype)
    if differing := sorted(tensors.keys() ^ stored.keys()):
        raise CheckpointError(f"{folder} is the checkpoint of another model: only one of them has {differing[0]}")
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=host_group("checkpoints"))
    return nested(content, tensors)
