"""A run folder that is deleted while the run writes to it."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from coca_lit.callbacks.checkpoint import Checkpoints
from coca_lit.callbacks.find import callbacks_of
from coca_lit.distributed import rank
from coca_lit.errors import DataError
from coca_lit.files import atomic_write
from coca_lit.runs.run_folder import CONFIG, ENVIRONMENT

log = logging.getLogger(__name__)


class RunFolderGuard(L.Callback):
    """Checks after each step that the run folder is still there. If not, it says so, makes the folder again and asks
    for a checkpoint, so that nothing else is lost.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.folder = Path(output_dir)
        self._files: dict[str, bytes] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if rank() == 0:
            present = [name for name in (CONFIG, ENVIRONMENT) if (self.folder / name).is_file()]
            self._files = {name: (self.folder / name).read_bytes() for name in present}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._look(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer)

    def _look(self, trainer: L.Trainer) -> None:
        if not self._files or (self.folder / CONFIG).exists():
            return
        log.warning("the run folder %s was deleted while the run writes to it; it is made again", self.folder)
        try:
            for name, content in self._files.items():
                atomic_write(self.folder / name, content)
        except DataError as error:
            log.warning("%s", error)
        for checkpoints in callbacks_of(trainer, Checkpoints):
            checkpoints.save_soon()
