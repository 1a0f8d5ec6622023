"""Zero-shot classification scores."""

from collections.abc import Sequence
from pathlib import Path

import torch

from coca_lit.data.datasets.classification import Classification
from coca_lit.data.records import Record
from coca_lit.evals.base import Evaluation
from coca_lit.evals.inference import embed_images, embed_texts
from coca_lit.metrics.zeroshot import class_features, classification_scores
from coca_lit.models import DualEncoder


class ZeroShotScores(Evaluation):
    """Top-1, top-5 and mean per-class recall of the classes nearest to the images, with all prompts of every class.

    Args:
        images: the classified images with class names and templates, see `coca_lit.data.datasets.classification`.
    """

    def __init__(
        self,
        name: str,
        images: Classification,
        output_dir: str | Path,
        batch_size: int = 64,
        num_workers: int = 0,
        limit: int | None = None,
        quick: int = 256,
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__(name, images.records, output_dir, batch_size, num_workers, limit, quick, every_n_epochs)
        self.labels = images.labels
        self.prompts = [template.replace("{}", c) for c in images.class_names for template in images.templates]
        self.classes = len(images.class_names)

    def scores(self, model: DualEncoder, records: Sequence[Record]) -> dict[str, float]:
        prompts = embed_texts(model, self.prompts, self.batch_size).unflatten(0, (self.classes, -1))  # (C, P, E)
        images = embed_images(model, records, self.batch_size, self.num_workers)  # (I, E)
        labels = torch.tensor([self.labels[record.id] for record in records])
        return classification_scores(images @ class_features(prompts).T, labels)
