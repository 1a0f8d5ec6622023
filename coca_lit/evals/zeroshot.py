"""Zero-shot classification scores."""

from collections.abc import Sequence

import torch

from coca_lit.data.datasets.classification import Classification
from coca_lit.data.records import Record
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.inference import embed_texts, evaluating, image_batches
from coca_lit.metrics.zeroshot import ZeroShotAccuracy, class_features
from coca_lit.models import DualEncoder


class ZeroShotScores(Evaluation):
    """Top-1, top-5 and mean per-class recall of the classes nearest to the images, with all prompts of every class.

    Args:
        images: the classified images with class names and templates, see `coca_lit.data.datasets.classification`.
    """

    score_names = ("top1", "top5", "mean_per_class_recall")

    def __init__(self, name: str, images: Classification, every: int = 1) -> None:
        super().__init__(name, images.records, every)
        self.labels = images.labels
        self.prompts = [template.replace("{}", c) for c in images.class_names for template in images.templates]
        self.classes = len(images.class_names)

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        return self._classify(model, records, settings).compute()

    def all_scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        accuracy = self._classify(model, records, settings)
        accuracy.resample = True
        scores = accuracy.compute()
        self.draws = accuracy.draws
        return scores

    def _classify(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> ZeroShotAccuracy:
        prompts = embed_texts(model, self.prompts, settings.batch_size).unflatten(0, (self.classes, -1))  # (C, P, E)
        classes = class_features(prompts)  # (C, E)
        accuracy = ZeroShotAccuracy()
        for positions, images in image_batches(model, records, settings.batch_size, settings.workers):
            features = evaluating(model, model.encode_image, images).float().cpu()  # (B, E)
            ids = [records[i].id for i in positions]
            accuracy.update(features @ classes.T, torch.tensor([self.labels[id] for id in ids]), ids)
        return accuracy
