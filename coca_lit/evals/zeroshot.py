"""Zero-shot classification scores."""

from collections.abc import Sequence

import torch
from torch import Tensor

from coca_lit.data.datasets.classification import Classification
from coca_lit.data.records import Record
from coca_lit.distributed import rank
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.inference import blind_log_likelihoods, embed_images, embed_texts, log_likelihoods
from coca_lit.evals.samples import confusion_samples
from coca_lit.metrics.zeroshot import ZeroShotAccuracy, class_features
from coca_lit.models import CoCa, DualEncoder


class ZeroShotScores(Evaluation):
    """Top-1, top-5 and mean per-class recall of the classes nearest to the images, with all prompts of every class.

    Args:
        images: the classified images with class names and templates, see `coca_lit.data.datasets.classification`.
        likelihood: at the end also by the decoder: "likelihood/top1" by log p(prompt | image), averaged over the
            prompts of a class, and "pmi/top1" by log p(prompt | image) - log p(prompt), which does not favour names
            that are short or frequent. It reads every prompt beside every image.
    """

    score_names = ("top1", "top5", "mean_per_class_recall")
    final_score_names = ()

    def __init__(self, name: str, images: Classification, likelihood: bool = False, every: int = 1) -> None:
        super().__init__(name, images.records, every)
        self.labels, self.likelihood = images.labels, likelihood
        self.prompts = [template.replace("{}", c) for c in images.class_names for template in images.templates]
        self.class_names = images.class_names

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        return self._accuracy(records, self._cosines(model, records, settings)).compute()

    def all_scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        ways = {"": self._cosines(model, records, settings)}
        if self.likelihood:
            if model.decoder is None:
                self.not_run[f"{self.name} likelihood"] = "the model has no decoder to read the prompts with"
            else:
                ways |= self._log_likelihoods(model, records, settings)
        if rank() == 0:
            found = ways[""].argmax(dim=1).tolist()
            classified = [(i, self.labels[records[i].id], found[i]) for i in range(len(records))]
            confused = confusion_samples(records, self.class_names, classified)
            settings.write_json("samples", f"{self.name}_confusion.json", confused)
        scores: dict[str, float] = {}
        for way, similarity in ways.items():
            accuracy = self._accuracy(records, similarity)
            accuracy.resample = True
            scores |= {f"{way}{score}": value for score, value in accuracy.compute().items()}
            self.draws |= {f"{way}{score}": draws for score, draws in accuracy.draws.items()}
        return scores

    def _cosines(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> Tensor:
        """(I, C) of images and classes."""
        prompts = embed_texts(model, self.prompts, settings.batch_size)  # (C · P, E)
        classes = class_features(prompts.unflatten(0, (len(self.class_names), -1)))  # (C, E)
        return embed_images(model, records, settings.batch_size, settings.workers) @ classes.T

    def _log_likelihoods(self, model: CoCa, records: Sequence[Record], settings: Settings) -> dict[str, Tensor]:
        """(I, C) of images and classes, means over the prompts of a class; with and without p(prompt)."""
        size, numbers = settings.batch_size, range(len(self.prompts))
        read = torch.stack(log_likelihoods(model, records, self.prompts, lambda _: numbers, size, settings.workers))
        ways = {"likelihood/": read, "pmi/": read - blind_log_likelihoods(model, self.prompts, size)}  # (I, C · P)
        return {way: values.unflatten(1, (len(self.class_names), -1)).mean(dim=2) for way, values in ways.items()}

    def _accuracy(self, records: Sequence[Record], similarity: Tensor) -> ZeroShotAccuracy:
        ids = [record.id for record in records]
        accuracy = ZeroShotAccuracy()
        accuracy.update(similarity, torch.tensor([self.labels[id] for id in ids]), ids)
        return accuracy
