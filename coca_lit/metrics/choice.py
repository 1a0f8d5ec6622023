"""Image-text choice: is the right text preferred to wrong ones, and the right image to a wrong one?

The scores that are compared may be cosines or log-likelihoods. As in retrieval, a tie is a wrong answer.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from coca_lit.metrics.uncertainty import Resampled


def is_right(scores: Sequence[Tensor], right: int = 1) -> np.ndarray:
    """Whether (N,) the first scores of each image are above all its others; a text without rivals is right.

    Args:
        scores: for each image one per text (K,), the right texts first.
        right: how many of them are right.

    Raises:
        ValueError: NaN, or an image with fewer texts.
    """
    for row in scores:
        if len(row) < right or row.isnan().any():
            raise ValueError(f"each image needs a number for {right} or more texts, got {row.tolist()}")
    return np.array([bool((row[:right].min() > row[right:]).all()) for row in scores])


def choice_accuracy(right: np.ndarray, kinds: Sequence[str | None]) -> Resampled:
    """ "accuracy" over all images (N,); of images with kinds also "KIND_accuracy" of each and their mean,
    "macro_accuracy".
    """
    members = {kind: np.array([own == kind for own in kinds], dtype=float) for kind in sorted(filter(None, set(kinds)))}

    def resampled(counts: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore"):  # a kind may be absent from a resample
            found = {kind: counts @ (of * right) / (counts @ of) for kind, of in members.items()}
        scores = {"accuracy": counts @ right / counts.sum(axis=1)}
        if found:
            scores["macro_accuracy"] = np.nanmean(list(found.values()), axis=0)
        return scores | {f"{kind}_accuracy": of for kind, of in found.items()}

    return resampled


def pair_accuracy(scores: Sequence[Tensor]) -> Resampled:
    """Winoground's "text_score", "image_score" and "group_score" (Thrush et al. 2022, arXiv 2204.03162) of N pairs of
    images whose texts are each other's rivals: both texts right for their images, both images right for their texts,
    and all of this.

    Args:
        scores: of 2 N images, pair after pair: (its own text, the text of the other image).
    """
    pairs = torch.stack(list(scores)).view(-1, 2, 2)  # (N, image, own or other text)
    text = is_right(pairs[:, 0].unbind()) & is_right(pairs[:, 1].unbind())
    # The rival of image 0 for text 0 is image 1 with the text that is not its own.
    image = ((pairs[:, 0, 0] > pairs[:, 1, 1]) & (pairs[:, 1, 0] > pairs[:, 0, 1])).numpy()
    found = {"text_score": text, "image_score": image, "group_score": text & image}
    return lambda counts: {name: counts @ of / counts.sum(axis=1) for name, of in found.items()}
