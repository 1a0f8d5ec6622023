"""Lightning's plugin that writes and reads the checkpoints of our runs."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from coca_lit.runs.checkpoint_io import save
from coca_lit.weights.sharded import REST, is_folder, nested, read_tensors


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes whole files or none, see `coca_lit.runs.checkpoint_io`, and reads plain values and tensors only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """As Lightning's, but never with code inside, whatever `weights_only` asks for. Where a GPU takes the tensors,
        the ranks of a machine map one copy of the file.
        """
        path = Path(path)
        mapped = torch.cuda.is_available()
        if not is_folder(path):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
        content = torch.load(path / REST, map_location=map_location, weights_only=True, mmap=mapped)
        return nested(content, read_tensors(path))
