"""Which layer of an image encoder knows most about classes: a linear probe of each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from coca_lit.data.datasets.classification import Classification
from coca_lit.data.records import Record
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.classification import accuracies
from coca_lit.evals.inference import rows_of
from coca_lit.models import DualEncoder
from coca_lit.models.inputs import Images
from coca_lit.projects.classification.linear import linear_classifier
from coca_lit.projects.classification.probes import check_same_classes
from coca_lit.projects.middle_layers.encoder import layers_of


class LayerProbes(Evaluation):
    """Accuracy of logistic regression on the mean token of each layer, "layer3/top1". Means have unit length.

    Args:
        images: the images that are classified.
        training: images of the same classes to learn from.
        c: inverse of the regularisation; the default is CLIP's for ImageNet.

    Raises:
        DataError: the two sets have other classes.
    """

    generates = False
    final_score_names = None

    def __init__(
        self, name: str, images: Classification, training: Classification, c: float = 0.316, every: int = 0
    ) -> None:
        super().__init__(name, images.records, every)
        check_same_classes(name, training.class_names, images.class_names)
        self.images = images
        self.training = training
        self.c = c

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        widths = layers_of(model.image_encoder.trunk)

        def means(_: Sequence[Record], images: Images) -> Tensor:
            return torch.cat(layer_means(model, images), dim=1)

        known = rows_of(model, self.training.records, means, settings.batch_size, settings.workers).split(widths, dim=1)
        asked = rows_of(model, records, means, settings.batch_size, settings.workers).split(widths, dim=1)
        labels = torch.tensor([self.training.labels[record.id] for record in self.training.records])
        ways = {}
        for layer, (features, tested) in enumerate(zip(known, asked, strict=True)):
            weights, biases = linear_classifier(features, labels, len(self.images.class_names), self.c)
            ways[f"layer{layer}/"] = tested.double() @ weights.T + biases  # (I, C)
        scores, self.draws = accuracies(ways, records, self.images.labels, settings.full)
        return scores


def layer_means(model: DualEncoder, images: Images) -> list[Tensor]:
    """(B, 3, H, W) -> the mean token of each layer, (B, C) of its own width C, of unit length."""
    encoder = model.image_encoder
    grids = encoder.trunk.forward_intermediates(encoder.normalise(images), intermediates_only=True)  # (B, C, h, w) each
    return [torch.nn.functional.normalize(grid.mean(dim=(2, 3)), dim=1) for grid in grids]
