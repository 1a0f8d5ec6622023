"""What each cell of a frozen image encoder's feature map knows: a linear probe of pixels.

Shapes: I images, S = h·w cells, C width of the encoder, K classes, masks of H x W pixels.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.errors import check_number
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.inference import rows_of
from coca_lit.metrics.uncertainty import Resampled, digest
from coca_lit.models import CoCa, DualEncoder
from coca_lit.models.inputs import Images
from coca_lit.projects.classification.linear import linear_classifier
from coca_lit.projects.classification.masks import Segmentation
from coca_lit.projects.classification.probes import check_same_classes


class SegmentationScores(Evaluation):
    """Mean intersection over union of classes, "segmentation/miou": logistic regression on the tokens of the grid,
    standardised, and interpolated to the pixels of the mask (bilinear), as in DINOv2's linear evaluation (Oquab et al.
    2023, arXiv 2304.07193, section 7.4). A class counts if it occurs in the masks.

    Args:
        images: the images that are segmented.
        training: images with the same classes to learn from.
        pixels: random ones of each training image that the regression sees.
        c: inverse of its regularisation.

    Raises:
        DataError: the two sets have other classes.
        ValueError: pixels is no whole number of at least 1, or c is not above 0.
    """

    score_names = ("segmentation/miou",)

    def __init__(
        self,
        name: str,
        images: Segmentation,
        training: Segmentation,
        pixels: int = 16,
        c: float = 0.1,
        every: int = 0,
    ) -> None:
        super().__init__(name, images.records, every)
        check_same_classes(name, training.class_names, images.class_names)
        check_number("pixels", pixels, whole=True, at_least=1)
        check_number("c", c, above=0)
        self.images = images
        self.training = training
        self.pixels = pixels
        self.c = c

    def depends_on(self, score: str, settings: Settings) -> dict[str, Any]:
        training = digest(record.id for record in self.training.records)
        return {"pixels": self.pixels, "c": self.c, "training_images": training}

    def compared_texts(self, records: Sequence[Record]) -> Sequence[str]:
        """The names of the classes."""
        return self.images.class_names

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        if not isinstance(model, CoCa) or model.image_encoder.token_kind is not None:
            self.not_run[f"{self.name} segmentation"] = "the probe takes a CoCa whose images have one shape"
            return {}
        known = grids(model, self.training.records, settings)  # (N, C, h, w)
        deviation, mean = torch.std_mean(known, dim=(0, 2, 3), keepdim=True)
        deviation = deviation.clamp_min(1e-6)
        generator = torch.Generator().manual_seed(0)
        features: list[Tensor] = []  # (pixels, C) of each training image, at random
        labels: list[Tensor] = []  # (pixels,)
        for grid, mask in _with_masks((known - mean) / deviation, self.training):
            chosen = torch.randint(mask.numel(), (self.pixels,), generator=generator)
            features.append(_at_pixels(grid, mask)[:, chosen].T)
            labels.append(mask.flatten()[chosen])
        classes = len(self.images.class_names)
        weights, biases = linear_classifier(torch.cat(features), torch.cat(labels), classes, self.c)
        logits = torch.einsum("kc,ichw->ikhw", weights.float(), (grids(model, records, settings) - mean) / deviation)
        logits += biases.float()[:, None, None]
        numbers = torch.arange(classes)[:, None]
        rows: list[Tensor] = []  # (3, K) of each image
        for grid, mask in _with_masks(logits, self.images):
            found = _at_pixels(grid, mask).argmax(dim=0) == numbers  # (K, H·W)
            true = mask.flatten() == numbers  # (K, H·W)
            rows.append(torch.stack([(found & true).sum(1), (found | true).sum(1), true.sum(1)]))
        resampled = mean_iou(*torch.stack(rows, dim=1).double().numpy())  # (I, K) each
        return self.resample([record.id for record in records], resampled, settings)


def grids(model: CoCa, records: Sequence[Record], settings: Settings) -> Tensor:
    """Tokens of the encoder on its square grid (I, C, h, w), on the CPU of every rank."""
    encoder = model.image_encoder

    def flat(_: Sequence[Record], images: Images) -> Tensor:
        return encoder(images)[:, encoder.prefix_tokens :].flatten(1)

    rows = rows_of(model, records, flat, settings.batch_size, settings.workers)  # (I, S · C)
    tokens = rows.unflatten(1, (-1, encoder.width)).transpose(1, 2)  # (I, C, S)
    return tokens.unflatten(2, (math.isqrt(tokens.shape[2]), -1))


def mean_iou(both: np.ndarray, either: np.ndarray, true: np.ndarray) -> Resampled:
    """The score of resampled images from pixel counts (I, K): intersection, union, and ground truth."""

    def resampled(counts: np.ndarray) -> dict[str, np.ndarray]:
        unions = counts @ either  # (D, K)
        occurs = counts @ true > 0
        ious = np.where(occurs, counts @ both / np.maximum(unions, 1), 0)
        return {"segmentation/miou": ious.sum(axis=1) / occurs.sum(axis=1)}

    return resampled


def _with_masks(grids: Tensor, images: Segmentation) -> Iterator[tuple[Tensor, Tensor]]:
    """Each grid (1, C, h, w) with the mask (H, W) of its image."""
    for grid, mask in zip(grids.split(1), images.masks, strict=False):
        yield grid, torch.from_numpy(mask()).long()


def _at_pixels(grid: Tensor, mask: Tensor) -> Tensor:
    """(1, C, h, w) -> (C, H·W)"""
    return F.interpolate(grid, mask.shape, mode="bilinear", align_corners=False)[0].flatten(1)
