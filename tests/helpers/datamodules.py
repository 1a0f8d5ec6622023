"""A training that only records what its batches held."""

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from coca_lit.data.batch import Batch
from coca_lit.models.presets import VOCABULARIES
from coca_lit.tokenizer import WordTokenizer

TOKENIZER = WordTokenizer(VOCABULARIES["scenes"])


class Recorder(LightningModule):
    """Trains one number and keeps what the batches held."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[str], int, int]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch.keys, int(batch.images.sum()), int(batch.tokens.sum())))
        return self.weight * batch.lengths.float().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: LightningDataModule, folder: Path, ckpt_path: Path | None = None, log: Callback | None = None) -> list:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1), *([log] if log else [])],
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module.seen
