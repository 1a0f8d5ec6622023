"""Checkpoint files that survive kills and full disks, and whose corruption is detected.

A file is written beside its target, read back, synced and only then renamed, so that under the final name there is
either nothing, the old file or a verified new one. `inspect` tells later whether it is still intact: every record of
the zip archive that PyTorch writes has a CRC, which PyTorch itself never checks.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from coca_lit.errors import CheckpointError, DataError, why_unreadable
from coca_lit.files import replacing
from coca_lit.runs.run_folder import step_files
from coca_lit.weights.intact import ContentError, check_archive
from coca_lit.weights.sharded import REST, check_shards, flat, is_folder

log = logging.getLogger(__name__)

SPARE = 64 * 2**20  # bytes that stay free beside a checkpoint, for logs and samples


class TornError(CheckpointError):
    """A file that was not written to its end, or has changed since."""


def save(checkpoint: dict[str, Any], target: Path) -> None:
    """Writes a checkpoint as described above. A disk that is full, fails or does not keep what it is given costs this
    checkpoint, not the run: a warning, and the older ones stay.

    Raises:
        CheckpointError: the content could never be loaded again, because something in it is code.
    """
    if is_folder(target):  # it has the tensors of this step already: only the rest is written again
        flat(checkpoint)
        target = target / REST
    try:
        with replacing(target) as temporary:
            tensors = [leaf for leaf in tree_leaves(checkpoint) if isinstance(leaf, torch.Tensor)]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
            needed = sum(storages.values())
            free = shutil.disk_usage(target.parent).free
            if free < needed + SPARE:
                raise OSError(
                    f"it needs {needed / 2**20:.0f} MB, {SPARE // 2**20} MB stay free for logs and samples, and "
                    f"{free / 2**20:.0f} MB are free"
                )
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
            inspect(temporary)
    except (DataError, TornError, RuntimeError) as error:  # RuntimeError: PyTorch's writer on a full disk
        reason = str(error.__cause__ or error).splitlines()[0]
        log.warning("could not save %s: %s; training continues, and older checkpoints stay", target.name, reason)
    except CheckpointError as error:
        raise CheckpointError(
            f"{target.name} could never be loaded: a callback, the data or the optimizer keeps more than tensors, "
            f"numbers, texts, lists and dictionaries ({error})"
        ) from error


def inspect(path: Path, checksums: bool = True) -> dict[str, Any]:
    """The content of a checkpoint, with tensors that have a shape but no data; of a folder without the tensors of
    weights and optimizers.

    Args:
        checksums: read all of it, to compare it with its checksums.

    Raises:
        CheckpointError: the file is torn or corrupt, or holds more than tensors and plain values.
    """
    if is_folder(path):
        if checksums:
            check_shards(path)
        path = path / REST
    try:
        archive = check_archive(path, checksums)
    except ContentError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except ValueError as error:
        raise TornError(f"{path} is not a whole checkpoint: {error}") from error
    if not archive:
        raise TornError(f"{path} is not a whole checkpoint: expected a zip archive, as PyTorch writes")
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # PyTorch's reader raises a dozen kinds of errors
        raise CheckpointError(f"{path} holds more than tensors and plain values: {why_unreadable(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a training checkpoint")
    return content


def newest_valid(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that is whole, with its content as `inspect` returns it.

    Raises:
        CheckpointError: none of them is whole.
    """
    files = step_files(folder)
    for path in files:
        try:
            return path, inspect(path)
        except CheckpointError as error:
            log.warning("skipped a checkpoint: %s", error)
    raise CheckpointError(
        f"none of the {len(files)} checkpoints in {folder} can be read; ckpt_path=null starts fresh and keeps them"
    )
