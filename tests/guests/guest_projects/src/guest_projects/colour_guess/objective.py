"""The guess, its loss, and its error as a score."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from coca_lit.data.batch import Batch
from coca_lit.data.records import Record
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.inference import embed_images
from coca_lit.models import CoCa, CoCaOutput
from coca_lit.training.objectives import Objective


class ColourGuess(Objective):
    """The squared error of the guess."""

    needs = ("image_features",)

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(colour=weight)

    def build(self, net: CoCa) -> None:
        self.guess = nn.Linear(net.config.embed_dim, 3)

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        truth = batch.images.float().mean(dim=(2, 3)) / 255  # (B, 3)
        return {"colour": (self.guess(out.image_features) - truth).square().mean()}


class ColourError(Evaluation):
    """The mean squared error of the guesses of the objective called "colour"."""

    def scores(self, model: CoCa, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        features = embed_images(model, records, settings.batch_size, settings.workers)  # (N, E)
        guess = model.objectives["colour"].guess
        pictures = [torch.from_numpy(np.array(record.image())).float() for record in records]
        truth = torch.stack([picture.mean(dim=(0, 1)) / 255 for picture in pictures])  # (N, 3)
        return {"colour_error": (guess(features.to(guess.weight.device)).cpu() - truth).square().mean().item()}
