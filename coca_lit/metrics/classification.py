"""Zero-shot classification: by the class whose prompts lie nearest to an image in the common space.

Shapes: I images, C classes, P prompts per class, D features.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from coca_lit.metrics.retrieval import check_numbers
from coca_lit.metrics.rows import Id, RowMetric
from coca_lit.metrics.uncertainty import Draws, Resampled, bootstrap, exact


def class_features(prompt_features: Tensor) -> Tensor:
    """One unit vector per class (C, D), from the features of its prompts (C, P, D): normalised, averaged, normalised
    again.
    """
    return F.normalize(F.normalize(prompt_features.float(), dim=-1).mean(dim=1), dim=-1)


def classification_scores(similarity: Tensor, labels: Tensor) -> dict[str, float]:
    """Shares in [0, 1]: "top1", "top5" (from five classes on) and "mean_per_class_recall", for (I, C) and labels (I,).

    The latter is the mean, over the classes that occur, of the share of their images that are found, also known as
    balanced accuracy. A wrong class that ties with the right one is placed before it, so a model that finds everything
    equally similar scores 0. torchmetrics' MulticlassAccuracy and MulticlassRecall are equal to these scores if there
    are no ties and every class occurs; they count a tie by the order of the classes, and a class without images as 0.

    Raises ValueError for NaN, for shapes that disagree and for labels beyond the classes.
    """
    ranks = class_ranks(similarity, labels)
    return exact(len(labels), _resampled(ranks.cpu().numpy(), labels.cpu().numpy(), similarity.shape[1]))


class ZeroShotAccuracy(RowMetric):
    """Accuracy of images that are classified batch by batch, on any number of processes.

    accuracy = ZeroShotAccuracy()
    for ids, images, labels in loader:
        similarity = encode_image(images) @ class_features(prompts).T  # (B, C)
        accuracy.update(similarity, labels, ids)
    accuracy.compute()  # {"top1": ..., "top5": ..., "mean_per_class_recall": ...}

    Args:
        resample: `compute` also finds `draws`.

    Attributes:
        draws: score -> its values for resampled images.
    """

    def __init__(self, resample: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.resample = resample
        self.draws: dict[str, Draws] = {}

    def update(self, similarity: Tensor, labels: Tensor, ids: Sequence[Id] | Tensor) -> None:
        """Similarities (B, C) of images and classes, class numbers (B,) and ids of the images."""
        ranks = class_ranks(similarity, labels).tolist()
        classes = similarity.shape[1]
        self.append(ids, ranks, labels.tolist(), [classes] * len(ranks))

    def compute(self) -> dict[str, float]:
        """`classification_scores` of all images, each counted once; ValueError if there are none."""
        by_id = self.rows()
        if not by_id:
            raise ValueError("there are no images to score: call update first")
        ranks, labels, classes = np.array(list(by_id.values())).T  # each (I,)
        resampled = _resampled(ranks, labels, int(classes.max()))
        if self.resample:
            self.draws = bootstrap(list(by_id), resampled)
        return exact(len(by_id), resampled)


def class_ranks(similarity: Tensor, labels: Tensor) -> Tensor:
    """(I,): how many wrong classes come no later than the right one; 0 is best. Raises as `classification_scores`."""
    if similarity.ndim != 2 or labels.shape != similarity.shape[:1] or not len(labels):
        raise ValueError(
            f"expected similarities (images, classes) and a label for each of one or more images, got "
            f"{tuple(similarity.shape)} and {tuple(labels.shape)}"
        )
    classes = similarity.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must be class numbers from 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    check_numbers(similarity)
    right = similarity.gather(1, labels[:, None])  # (I, 1)
    return (similarity >= right).sum(dim=1) - 1  # the right class itself is not counted


def _resampled(ranks: np.ndarray, labels: np.ndarray, classes: int) -> Resampled:
    """`classification_scores` of images that are drawn with replacement, from `class_ranks` (I,) and labels (I,)."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    found = (ranks == 0)[order]

    def resampled(counts: np.ndarray) -> dict[str, np.ndarray]:
        ordered = counts[:, order]  # (D, I)
        totals = np.add.reduceat(ordered, starts, axis=1)  # (D, classes that occur)
        rights = np.add.reduceat(ordered * found, starts, axis=1)
        per_class = np.where(totals > 0, rights / np.maximum(totals, 1), 0).sum(axis=1) / (totals > 0).sum(axis=1)
        top5 = {"top5": counts @ (ranks < 5) / counts.sum(axis=1)} if classes >= 5 else {}
        return {"top1": rights.sum(axis=1) / counts.sum(axis=1), **top5, "mean_per_class_recall": per_class}

    return resampled
