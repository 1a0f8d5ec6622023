"""Scores of classes that are learned from features of images, without any text: what the image encoder knows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coca_lit.data.datasets.classification import Classification
from coca_lit.data.records import Record
from coca_lit.errors import DataError, check_number
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.classification import accuracies
from coca_lit.evals.inference import embed_images
from coca_lit.metrics.uncertainty import Draws, difference, digest
from coca_lit.models import CoCa, DualEncoder
from coca_lit.projects.classification.linear import linear_classifier, neighbour_votes
from coca_lit.projects.classification.pooler_probe import PoolerProbe


class ProbeScores(Evaluation):
    """Accuracy of classes that are learned from the features of training images: "knn/top1" by a vote of the nearest
    ones, "linear/top1" by logistic regression. The features are the ones that retrieval uses, of unit length. With a
    `pooler` also "pooler/top1" by an attentional pooler on all tokens of the image encoder, "mean/top1" by logistic
    regression on their means, and "pooler_gain/top1": the first minus the second, on the same images, with the p-value
    of the paired test, "pooler_gain/p".

    Args:
        images: the images that are classified.
        training: images of the same classes to learn from.
        k: neighbours that vote.
        c: inverse of the regularisation of the linear classifier; the default is CLIP's for ImageNet.
        pooler: how the pooler is trained; None for none.

    Raises:
        DataError: the two sets have other classes.
        ValueError: k is no whole number of at least 1, or c is not above 0.
    """

    score_names = ("knn/top1", "linear/top1")

    def __init__(
        self,
        name: str,
        images: Classification,
        training: Classification,
        k: int = 20,
        c: float = 0.316,
        pooler: PoolerProbe | None = None,
        every: int = 0,
    ) -> None:
        super().__init__(name, images.records, every)
        check_same_classes(name, training.class_names, images.class_names)
        check_number("k", k, whole=True, at_least=1)
        check_number("c", c, above=0)
        self.images = images
        self.training = training
        self.k = k
        self.c = c
        self.pooler = pooler if pooler is not None and pooler.epochs else None

    def depends_on(self, score: str, settings: Settings) -> dict[str, Any]:
        own: dict[str, Any] = {"k": self.k} if score.startswith("knn/") else {"c": self.c}
        if score.startswith("pooler") and self.pooler is not None:
            own = self.pooler.conditions | (own if "gain" in score else {})
        return own | {"training_images": digest(record.id for record in self.training.records)}

    def compared_texts(self, records: Sequence[Record]) -> Sequence[str]:
        """The classes of the images, and all names of classes."""
        return [
            *(self.images.class_names[self.images.labels[record.id]] for record in records),
            *self.images.class_names,
        ]

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        device = model.device if model.device.type == "cuda" else "cpu"  # others may lack float64

        def features(records: Sequence[Record]) -> Tensor:
            return embed_images(model, records, settings.batch_size, settings.workers).to(device)

        known = features(self.training.records)  # (N, E)
        asked = features(records)  # (I, E)
        labels = torch.tensor([self.training.labels[record.id] for record in self.training.records]).to(device)
        classes = len(self.images.class_names)
        weights, biases = linear_classifier(known, labels, classes, self.c)
        votes = neighbour_votes(known, labels, asked, classes, min(self.k, len(known)))  # (I, C)
        # Of equal votes the first class wins, as in scikit-learn.
        votes = votes - torch.arange(classes, device=votes.device) / (classes + 1)
        ways = {"knn/": votes, "linear/": asked.double() @ weights.T + biases}
        if self.pooler is not None and settings.full:
            if not isinstance(model, CoCa) or model.image_encoder.token_kind is not None:
                self.not_run[f"{self.name} pooler"] = "the probe takes a CoCa whose images have one shape"
            else:
                probed = self.pooler.probe(model, self.training.records, labels, records, classes, settings.workers)
                weights, biases = linear_classifier(probed.train_means, labels.cpu(), classes, self.c)
                ways["pooler/"] = probed.logits
                ways["mean/"] = probed.means.double() @ weights.T + biases  # of the means of the tokens
        scores, self.draws = accuracies(ways, records, self.images.labels, settings.full)
        if "pooler/top1" in self.draws:
            scores |= self._gain(self.draws["mean/top1"], self.draws["pooler/top1"])
        return scores

    def _gain(self, mean: Draws, pooler: Draws) -> dict[str, float]:
        """How much better the pooler is than the linear probe of the means, whose draws are noted, with its p-value."""
        gain = difference(mean, pooler)
        values = pooler.values - mean.values
        self.draws["pooler_gain/top1"] = Draws(values, gain.value, pooler.units, pooler.trials)
        return {"pooler_gain/top1": gain.value, "pooler_gain/p": gain.p}


def check_same_classes(name: str, taught: Sequence[str], asked: Sequence[str]) -> None:
    """Raises `DataError` unless the training images of a probe have the classes of the images that it is scored on."""
    if taught != asked:
        raise DataError(
            f"the training images of {name} must have the classes of the others: got {len(taught)} and {len(asked)}"
        )
