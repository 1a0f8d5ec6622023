"""The guess, its loss, its error as a score, and images and texts compared by their colours."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from coca_lit.data.batch import Batch
from coca_lit.data.records import Record
from coca_lit.evals.base import Evaluation, Settings, required_objective
from coca_lit.evals.inference import embed_images
from coca_lit.evals.retrieval import Comparison
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
    """The mean squared error of the guesses."""

    def scores(self, model: CoCa, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        guess = required_objective(model, ColourGuess).guess  # else the run says why there is no score
        features = embed_images(model, records, settings.batch_size, settings.workers)  # (N, E)
        pictures = [torch.from_numpy(np.array(record.image())).float() for record in records]
        truth = torch.stack([picture.mean(dim=(0, 1)) / 255 for picture in pictures])  # (N, 3)
        return {"colour_error": (guess(features.to(guess.weight.device)).cpu() - truth).square().mean().item()}


class ColourLikeness(Comparison):
    """How near the guess of the text's vector is to that of the image's."""

    def check(self, model: CoCa) -> None:
        required_objective(model, ColourGuess)

    def encode_images(self, model: CoCa, images: Tensor) -> Tensor:
        return required_objective(model, ColourGuess).guess(model.encode_image(images))  # (B, 3)

    def encode_texts(self, model: CoCa, tokens: Tensor) -> Tensor:
        return required_objective(model, ColourGuess).guess(model.encode_text(tokens))  # (N, 3)

    def compare(self, model: CoCa, images: Tensor, texts: Tensor) -> Tensor:
        return -torch.cdist(images, texts)
