"""Checkpoints that are folders: what every rank of a sharded run holds, in a file of its own.

    step_1000.ckpt/
        checkpoint.ckpt                    everything but tensors of weights and optimizer: position, settings, counters
        shards.json                        size and CRC-32 of every file of tensors
        shard-00001-….safetensors …        the tensors of a rank, as torch.distributed.checkpoint writes them

Tensors are named `state_dict.NAME` and `optimizer_states.OPTIMIZER.PARAMETER.NAME`. No file is a pickle but the first,
which is read like any other checkpoint: tensors and plain values alone.
"""

import json
import math
import zlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coca_lit.errors import CheckpointError, DataError
from coca_lit.files import size_and_time
from coca_lit.reading import open_regular, read_json

if TYPE_CHECKING:  # a wrong path is found before torch is imported
    from torch import Tensor

REST = "checkpoint.ckpt"
SHARDS = "shards.json"
STATE, OPTIMIZERS = "state_dict", "optimizer_states"  # in a checkpoint that is one file, too


def is_folder(path: Path) -> bool:
    """Whether a checkpoint is such a folder."""
    return (path / REST).is_file()


def is_checkpoint(path: Path) -> bool:
    """Whether there is a checkpoint, a file or a folder."""
    return path.is_file() or is_folder(path)


def flat(checkpoint: dict[str, Any]) -> dict[str, "Tensor"]:
    """Removes the tensors of weights and optimizers from a checkpoint and returns them by their names in a folder."""
    from torch import Tensor

    tensors = {f"{STATE}.{name}": tensor for name, tensor in checkpoint.pop(STATE).items()}
    for number, optimizer in enumerate(checkpoint.get(OPTIMIZERS, [])):
        for parameter, values in optimizer["state"].items():
            for name in [name for name, value in values.items() if isinstance(value, Tensor)]:
                tensors[f"{OPTIMIZERS}.{number}.{parameter}.{name}"] = values.pop(name)
    return tensors


def nested(checkpoint: dict[str, Any], tensors: dict[str, "Tensor"]) -> dict[str, Any]:
    """The inverse of `flat`: puts the tensors back into the checkpoint, and returns it."""
    checkpoint[STATE] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == STATE:
            checkpoint[STATE][name] = tensor
        else:
            number, parameter, name = name.split(".")
            checkpoint[OPTIMIZERS][int(number)]["state"].setdefault(int(parameter), {})[name] = tensor
    return checkpoint


def check_shards(folder: Path) -> None:
    """Raises `CheckpointError` unless all files of tensors are there and hold what was written."""
    try:
        written = read_json(folder / SHARDS, dict)
        found = {path.name: facts(path) for path in folder.glob("*.safetensors")}
    except (OSError, DataError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {error}") from error
    missing = sorted(written.keys() ^ found.keys())
    if missing:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {missing[0]} is missing or was added")
    for name, its in found.items():
        if its != written[name]:
            raise CheckpointError(f"{folder} is not a whole checkpoint: {name} is not what was written")


def facts(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file. It is read once as long as it does not change: resuming asks several times."""
    size, changed = size_and_time(path)
    return {"bytes": size, "crc32": _crc32(path, size, changed)}


@lru_cache(maxsize=4096)
def _crc32(path: Path, size: int, changed: int) -> int:
    crc = 0
    with open_regular(path) as file:
        while part := file.read(2**22):
            crc = zlib.crc32(part, crc)
    return crc


def sizes(folder: Path) -> dict[str, Any]:
    """The metadata of all tensors by name, each with its `size` (shape) and `properties.dtype`.

    Raises:
        CheckpointError: parts of a tensor are missing, or are not where the files say.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    try:
        tensors: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:  # of many kinds: a stranger's header
        raise CheckpointError(f"{folder} is not a whole checkpoint: {error}") from error
    for name, tensor in tensors.items():
        if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
            raise CheckpointError(f"{folder} is not a whole checkpoint: parts of {name} are missing")
    return tensors


def read_tensors(folder: Path, optimizers: bool = True) -> dict[str, "Tensor"]:
    """The whole tensors of a folder, on the CPU, for `nested`.

    Args:
        optimizers: also the state of the optimizers, twice the size of the weights.

    Raises:
        CheckpointError: it is not whole.
    """
    import torch
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    wanted = {name: about for name, about in sizes(folder).items() if optimizers or name.startswith(f"{STATE}.")}
    tensors = {name: torch.zeros(about.size, dtype=about.properties.dtype) for name, about in wanted.items()}
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def manifest(written: dict[str, dict[str, int]]) -> bytes:
    """The content of `shards.json`."""
    return f"{json.dumps(written, indent=1, sort_keys=True)}\n".encode()
