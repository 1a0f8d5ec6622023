"""Dropout that depends on the step and not on the past, so that a resumed run drops what the first would have."""

import lightning.pytorch as L
import torch

from coca_lit.data.batch import Batch
from coca_lit.seeding import stable_seed


class StepSeeds(L.Callback):
    """Seeds PyTorch's generators of the CPU and the GPUs before every batch by (seed, epoch, batch, rank)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        torch.manual_seed(stable_seed("step", self.seed, trainer.current_epoch, batch_idx, trainer.global_rank))
