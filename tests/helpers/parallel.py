"""Short trainings on two processes."""

from pathlib import Path
from typing import Any

import torch

from helpers.running import launched, run

UNSCORED = (
    "experiment=scenes",
    *("trainer=cpu", "trainer.max_epochs=1", "trainer.limit_val_batches=0", "data.batch_size=8"),
    *("model.warmup_steps=2", "trainer.gradient_clip_val=0.5", "model.optimizer.lr=1e-4", "trainer.precision=32-true"),
    "+model.net.image_encoder=vit_base_patch32_clip_224",
    "+model.net.image_encoder_args={patch_size:8,embed_dim:64,depth:2,num_heads:2}",
)
SHORT = (*UNSCORED, "evals=[]")
DDP = ("trainer.devices=2", "trainer.strategy=ddp")
SHARDED = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2")


def train(folder: Path, *overrides: str) -> None:
    """A short training in this process, or as one rank of several."""
    with launched():
        run(folder, *SHORT, *overrides)


def saved(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
