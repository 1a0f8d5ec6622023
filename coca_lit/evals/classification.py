"""Scores of zero-shot classification, by the names of the classes."""

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from coca_lit.data.datasets.classification import Classification
from coca_lit.data.records import Record
from coca_lit.distributed import rank
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.inference import blind_log_likelihoods, embed_images, embed_texts, log_likelihoods
from coca_lit.evals.samples import confusion_samples
from coca_lit.metrics.classification import ZeroShotAccuracy, class_features
from coca_lit.metrics.uncertainty import Draws
from coca_lit.models import DualEncoder


class ZeroShotScores(Evaluation):
    """Top-1, top-5 and mean per-class recall of the classes nearest to the images, with all prompts of every class.

    Args:
        images: the classified images with class names and templates, see `coca_lit.data.datasets.classification`.
        likelihood: with `settings.full` also by the decoder: "likelihood/top1" by log p(prompt | image), averaged over
            the prompts of a class, and "pmi/top1" by log p(prompt | image) - log p(prompt), which does not favour names
            that are short or frequent. It reads every prompt beside every image.
    """

    generates = False
    score_names = ("top1", "top5", "mean_per_class_recall")

    def __init__(self, name: str, images: Classification, likelihood: bool = False, every: int = 1) -> None:
        super().__init__(name, images.records, every)
        self.labels = images.labels
        self.likelihood = likelihood
        self.prompts = [template.replace("{}", c) for c in images.class_names for template in images.templates]
        self.class_names = images.class_names

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        size = settings.batch_size
        workers = settings.workers
        count = len(self.class_names)
        prompts = embed_texts(model, self.prompts, size).unflatten(0, (count, -1))  # (C, P, E)
        classes = class_features(prompts)  # (C, E)
        ways = {"": embed_images(model, records, size, workers) @ classes.T}  # (I, C)
        if settings.full and self.likelihood:
            if model.decoder is None:
                self.not_run[f"{self.name} likelihood"] = "the model has no decoder to read the prompts with"
            else:
                numbers = range(len(self.prompts))
                read = torch.stack(log_likelihoods(model, records, self.prompts, lambda _: numbers, size, workers))
                blind = blind_log_likelihoods(model, self.prompts, size)
                for way, values in {"likelihood/": read, "pmi/": read - blind}.items():  # (I, C · P)
                    ways[way] = values.unflatten(1, (count, -1)).mean(dim=2)  # over the prompts of a class
        ways = {way: _told_apart(similarity.cpu(), self.class_names) for way, similarity in ways.items()}
        if settings.full and rank() == 0:
            chosen = ways[""].argmax(dim=1).tolist()
            classified = [(i, self.labels[records[i].id], chosen[i]) for i in range(len(records))]
            confused = confusion_samples(records, self.class_names, classified)
            settings.write_json("samples", f"{self.name}_confusion.json", confused)
        scores, self.draws = accuracies(ways, records, self.labels, settings.full)
        return scores

    def compared_texts(self, records: Sequence[Record]) -> Sequence[str]:
        """The prompts of all classes, of which one is chosen, then the classes of the images."""
        return [*self.prompts, *(self.class_names[self.labels[record.id]] for record in records)]


def _told_apart(similarity: Tensor, names: Sequence[str]) -> Tensor:
    """Similarities (I, C) in which the first class of a name is above the others, whose prompts are the same: one is
    chosen, as by OpenCLIP's `topk`. ImageNet has two such pairs.
    """
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        known = first.setdefault(name, i)
        if known != i:
            similarity[:, i] = similarity[:, known].nextafter(torch.tensor(-torch.inf))
    return similarity


def accuracies(
    ways: Mapping[str, Tensor], records: Sequence[Record], labels: Mapping[Hashable, int], full: bool
) -> tuple[dict[str, float], dict[str, Draws]]:
    """The scores of `ZeroShotAccuracy`, and with `full` their draws, for each of several similarities (I, C) of images
    and classes, by the prefix of its scores.
    """
    scores: dict[str, float] = {}
    draws: dict[str, Draws] = {}
    ids = [record.id for record in records]
    for way, similarity in ways.items():
        accuracy = ZeroShotAccuracy(resample=full, sync_on_compute=False)  # all is known on every rank
        accuracy.update(similarity.cpu(), torch.tensor([labels[id] for id in ids]), ids)
        scores |= {f"{way}{score}": value for score, value in accuracy.compute().items()}
        draws |= {f"{way}{score}": values for score, values in accuracy.draws.items()}
    return scores, draws
