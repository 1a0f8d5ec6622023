"""What the image encoder knows about classes without any text: nearest neighbours and a linear probe."""

from collections.abc import Sequence

import torch
from torch import Tensor

from coca_lit.data.datasets.classification import Classification
from coca_lit.data.records import Record
from coca_lit.errors import DataError
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.inference import embed_images
from coca_lit.metrics.probes import linear_classifier, neighbour_votes
from coca_lit.metrics.zeroshot import ZeroShotAccuracy
from coca_lit.models import DualEncoder


class ProbeScores(Evaluation):
    """Accuracy of classes that are learned from the features of training images: "knn/top1" by a vote of the nearest
    ones, "linear/top1" by logistic regression. The features are the ones that retrieval uses, of unit length.

    Args:
        images: the images that are classified.
        training: images of the same classes to learn from.
        k: neighbours that vote.
        c: inverse of the regularisation of the linear classifier; the default is CLIP's for ImageNet.

    Raises:
        DataError: the two sets have other classes.
    """

    score_names = ("knn/top1", "linear/top1")
    final_score_names = ()

    def __init__(
        self,
        name: str,
        images: Classification,
        training: Classification,
        k: int = 20,
        c: float = 0.316,
        every: int = 0,
    ) -> None:
        super().__init__(name, images.records, every)
        if images.class_names != training.class_names:
            raise DataError(
                f"the training images of {name} must have the classes of the others: got {len(training.class_names)} "
                f"and {len(images.class_names)}"
            )
        self.images, self.training, self.k, self.c = images, training, k, c

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        scores: dict[str, float] = {}
        for way, accuracy in self._learned(model, records, settings).items():
            scores |= {f"{way}/{score}": value for score, value in accuracy.compute().items()}
            self.draws |= {f"{way}/{score}": draws for score, draws in accuracy.draws.items()}
        return scores

    def _learned(
        self, model: DualEncoder, records: Sequence[Record], settings: Settings
    ) -> dict[str, ZeroShotAccuracy]:
        def features(records: Sequence[Record]) -> Tensor:
            return embed_images(model, records, settings.batch_size, settings.workers).to(model.device)

        known, seen, classes = features(self.training.records), features(records), len(self.images.class_names)
        taught = torch.tensor([self.training.labels[record.id] for record in self.training.records])
        taught, labels = taught.to(model.device), torch.tensor([self.images.labels[record.id] for record in records])
        weights, biases = linear_classifier(known, taught, classes, self.c)
        found = {
            "knn": _first_of_ties(neighbour_votes(known, taught, seen, classes, min(self.k, len(known)))),
            "linear": seen.double() @ weights.T + biases,
        }
        ids = [record.id for record in records]
        metrics = {way: ZeroShotAccuracy(resample=True) for way in found}
        for way, scores in found.items():
            metrics[way].update(scores.cpu(), labels, ids)
        return metrics


def _first_of_ties(votes: Tensor) -> Tensor:
    """Scores (I, C) that no two classes share: of equal votes the first class wins, as in scikit-learn."""
    return votes - torch.arange(votes.shape[1], device=votes.device) / (votes.shape[1] + 1)
