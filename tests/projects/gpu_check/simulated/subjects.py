"""What is run on a simulated GPU."""

from pathlib import Path
from typing import Any

import torch

from coca_lit.models import CoCa, create_model

TINY = (
    *("experiment=scenes", "trainer=smoke", "data.batch_size=8", "data.train_count=56"),
    *("trainer.max_steps=7", "trainer.limit_train_batches=null", "trainer.log_every_n_steps=100", "evals=[]"),
    *("trainer.limit_val_batches=0", "model.warmup_steps=2", "model.optimizer.lr=1e-3"),
    "+model.net.image_encoder=vit_tiny_patch16_224",
    "+model.net.image_encoder_args={patch_size:16,embed_dim:32,depth:1,num_heads:2}",
)


def small_net() -> CoCa:
    torch.manual_seed(0)
    vit = {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    return create_model("coca_tiny", image_encoder="vit_tiny_patch16_224", image_encoder_args=vit).eval()


def images(count: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def weights(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
