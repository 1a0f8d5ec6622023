"""What image features know about classes without any text: votes of the nearest neighbours, a linear classifier on
frozen features.

Both equal scikit-learn's (`KNeighborsClassifier`, `LogisticRegression`) and run on the features' device.

Shapes: I images, N training images, C classes, D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1000  # images that are compared with all training images at a time
STEPS = 1000
LOGITS = 2**24  # that are held at a time


def neighbour_votes(train: Tensor, labels: Tensor, images: Tensor, classes: int, k: int) -> Tensor:
    """How many (I, C) of the k nearest training images by cosine belong to each class, as scikit-learn counts them with
    metric="cosine"; the class is the first one with the most votes.

    Args:
        train, images: (N, D) and (I, D) of unit length.
        labels: (N,)
        k: from 1 to N.
    """
    votes = torch.zeros(len(images), classes, device=images.device)
    for part, counted in zip(images.split(CHUNK), votes.split(CHUNK), strict=True):
        nearest = labels[(part @ train.T).topk(k).indices]  # (i, k)
        counted.scatter_add_(1, nearest, torch.ones_like(nearest, dtype=votes.dtype))
    return votes


def linear_classifier(train: Tensor, labels: Tensor, classes: int, c: float) -> tuple[Tensor, Tensor]:
    """Weights (C, D) and biases (C,) of multinomial logistic regression, the minimum of
    c · Σ cross-entropy + ½ ‖weights‖², as scikit-learn's with `C=c`; found by L-BFGS in float64.

    Args:
        train: (N, D)
        labels: (N,)
        c: the inverse of the regularisation, above 0.
    """
    weights = torch.zeros(classes, train.shape[1], dtype=torch.float64, device=train.device, requires_grad=True)
    biases = torch.zeros(classes, dtype=torch.float64, device=train.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, biases], max_iter=STEPS, tolerance_grad=1e-8, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )
    rows = max(LOGITS // classes, 1)

    def objective() -> Tensor:
        """Divided by c · N, so that its scale does not depend on the number of images; with its gradients."""
        optimizer.zero_grad()
        total = (weights**2).sum() / (2 * c * len(train))
        total.backward()
        for part, taught in zip(train.split(rows), labels.split(rows), strict=True):
            logits = F.linear(part.double(), weights, biases)  # (rows, C)
            loss = F.cross_entropy(logits, taught, reduction="sum") / len(train)
            loss.backward()
            total = total + loss
        return total.detach()

    with torch.enable_grad():
        optimizer.step(objective)
    return weights.detach(), biases.detach()
