"""How Lightning writes and reads checkpoints: safely, see `coca_lit.runs.checkpoint_io`, which needs no Lightning."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from coca_lit.runs.checkpoint_io import save, upgrade
from coca_lit.weights.sharded import REST, is_folder, nested, read_tensors


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes whole files or none, and reads plain values and tensors only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save(checkpoint, Path(path))

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable | None = lambda storage, _: storage,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """As Lightning's, but never with code inside, whatever `weights_only` asks for. Where a GPU takes the tensors,
        the ranks of a machine map one copy of the file.
        """
        folder = Path(path) if is_folder(Path(path)) else None
        if folder is not None:
            path = folder / REST
        mapped = torch.cuda.is_available()
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
        return upgrade(content if folder is None else nested(content, read_tensors(folder)))
