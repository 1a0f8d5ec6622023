"""Zero-shot classification: the class whose prompts lie nearest to an image in the common space.

Shapes: I images, C classes, P prompts per class, D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def class_features(prompt_features: Tensor) -> Tensor:
    """One unit vector per class (C, D), from the features of its prompts (C, P, D): normalised, averaged, normalised
    again.
    """
    return F.normalize(F.normalize(prompt_features.float(), dim=-1).mean(dim=1), dim=-1)


def classification_scores(similarity: Tensor, labels: Tensor) -> dict[str, float]:
    """Shares in [0, 1]: "top1", "top5" (from five classes on) and "mean_per_class_recall", for (I, C) and labels (I,).

    The latter is the mean over the classes that occur of the share of their images that are found, also known as
    balanced accuracy. A wrong class that ties with the right one is placed before it, so a model that finds everything
    equally similar scores 0. Raises ValueError for NaN, for shapes that disagree and for labels beyond the classes.
    """
    if similarity.ndim != 2 or labels.shape != similarity.shape[:1] or not len(labels):
        raise ValueError(
            f"expected similarities (images, classes) and a label for each of one or more images, got "
            f"{tuple(similarity.shape)} and {tuple(labels.shape)}"
        )
    classes = similarity.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must be class numbers from 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    if similarity.isnan().any():
        raise ValueError("the similarities hold NaN, so nothing can be ranked; look for NaN in the model's features")
    right = similarity.gather(1, labels[:, None])  # (I, 1)
    ranks = (similarity >= right).sum(dim=1) - 1  # (I,), 0 is best; the right class itself is not counted
    found = (ranks == 0).double()
    totals = torch.bincount(labels, minlength=classes)
    per_class = torch.bincount(labels, weights=found, minlength=classes)[totals > 0] / totals[totals > 0]
    top5 = {"top5": (ranks < 5).double().mean().item()} if classes >= 5 else {}
    return {"top1": found.mean().item(), **top5, "mean_per_class_recall": per_class.mean().item()}
