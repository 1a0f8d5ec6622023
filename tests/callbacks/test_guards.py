"""Training that makes no progress: what is reported, and when."""

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from coca_lit.callbacks import StallGuard
from coca_lit.data.batch import Batch


class Slow(Dataset[Batch]):
    """Batches of which one takes its time."""

    def __init__(self, slow: int, seconds: float) -> None:
        self.slow, self.seconds = slow, seconds

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Batch:
        if i == self.slow:
            time.sleep(self.seconds)
        return Batch(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2), torch.ones(1), [f"sample {i}"])


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return self.layer(torch.ones(1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch


@pytest.mark.parametrize("stalls", [False, True])
def test_a_wait_for_data_is_reported_once_with_its_place(
    tmp_path: Path, stalls: bool, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    loader = DataLoader(Slow(2, 1.0 if stalls else 0.0), batch_size=None)
    options: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[StallGuard(minutes=0.4 / 60)], **options)
    trainer.fit(Module(), loader)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("coca_lit")]
    assert len(ours) == stalls
    said = capfd.readouterr().err
    if stalls:
        assert "after step 2; its last samples: sample 1" in ours[0]
        assert "in __getitem__" in said
    else:
        assert "__getitem__" not in said
