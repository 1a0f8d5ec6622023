"""An objective with a parameter of its own, a callback and a logger."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from coca_lit.data.batch import Batch
from coca_lit.models import CoCa, CoCaOutput, register_objective
from coca_lit.training.objectives import Objective


@register_objective("brightness")
class Brightness(Objective):
    """How far a linear guess from the image features is from the mean brightness, squared. Kept with the model."""

    needs = ("image_features",)

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(brightness=weight)

    def build(self, net: CoCa) -> None:
        self.guess = nn.Linear(net.config.embed_dim, 1)

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        truth = batch.images.float().flatten(1).mean(dim=1) / 255  # (B,)
        guess = self.guess(out.image_features)[:, 0]  # (B,)
        return {"brightness": (guess - truth).square().mean()}


class CountSteps(L.Callback):
    """Writes the number of training steps when training ends."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.path.write_text(str(trainer.global_step))


class JsonLogger(Logger):
    """A JSON object per logged step."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)

    @property
    def name(self) -> str:
        return "json"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
