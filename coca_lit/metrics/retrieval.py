"""Image-text retrieval by counting ranks: how many of the others does the model place before the right one?

The ground truth is an index, ``image_of_text[t]``, so images may have any number of captions.
Shapes: I images, T texts, D features, Q queries, C candidates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from coca_lit.metrics.uncertainty import Resampled, exact

KS = (1, 5, 10)
Matrix = Tensor | np.ndarray


class Ranks(NamedTuple):
    """How many wrong candidates come no later than the best right one, for each query; 0 is best.

    Attributes:
        t2i: (T,) of texts that ask for their image.
        i2t: (I,) of images that ask for one of their texts.
        image_of_text: (T,)
    """

    t2i: Tensor
    i2t: Tensor
    image_of_text: Tensor

    def recalls(self, ks: Sequence[int] = KS) -> dict[str, float]:
        """Shares in [0, 1] of queries with a right answer among their k most similar candidates."""
        if not ks or min(ks) < 1:
            raise ValueError(f"ks must be one or more numbers from 1 on, got {list(ks)}")
        return {name: value for name, value in self.scores(ks).items() if "recall" in name}

    def scores(self, ks: Sequence[int] = KS) -> dict[str, float]:
        """Recalls, and median ranks; 1 is best."""
        return exact(len(self.i2t), self.resampled(ks))

    def resampled(self, ks: Sequence[int] = KS) -> Resampled:
        """Recalls and median ranks of images that are drawn with replacement, each with its texts. The candidates stay:
        what varies is what is asked for.
        """
        owner = self.image_of_text.cpu().numpy()
        ranks = {"t2i": self.t2i.cpu().numpy(), "i2t": self.i2t.cpu().numpy()}
        image_of = {"t2i": owner, "i2t": np.arange(len(self.i2t))}

        def resampled(counts: np.ndarray) -> dict[str, np.ndarray]:
            recalls = {}
            medians = {}
            for name, image in image_of.items():
                queries = counts @ np.bincount(image, minlength=len(self.i2t))
                for k in ks:
                    found = np.bincount(image, weights=ranks[name] < k, minlength=len(self.i2t))
                    recalls[f"{name}_recall@{k}"] = counts @ found / queries
                order = np.argsort(ranks[name], kind="stable")
                reached = counts[:, image[order]].cumsum(axis=1)  # (D, Q)
                middle = [(reached <= (queries[:, None] - half) // 2).sum(axis=1) for half in (1, 0)]
                lower, upper = (ranks[name][order][m] for m in middle)
                medians[f"{name}_median_rank"] = 1 + (lower + upper) / 2
            return recalls | medians

        return resampled


def recall_at_k(similarity: Matrix, image_of_text: Tensor | Sequence[int], ks: Sequence[int] = KS) -> dict[str, float]:
    """Shares in [0, 1] of queries with a right answer among their k most similar candidates.

    ``similarity`` is (I, T), and text t describes image ``image_of_text[t]``. ``t2i_recall@k`` is the share of texts
    with their image in the top k, ``i2t_recall@k`` the share of images with at least one of their texts in the top k.

    Example: two images; texts 0, 1, 2 describe image 0 and text 3 describes image 1, ``image_of_text = [0, 0, 0, 1]``::

        similarity = [[.9, .4, .1, .2],    image 0 has its text 0 in first place
                      [.3, .5, .6, .4]]    image 1 has its text 3 in third place, after texts 2 and 1

    Down the columns, texts 0 and 3 have their image in first place, texts 1 and 2 in second. So ``ks=(1, 2)`` gives
    t2i_recall@1 = 0.5, t2i_recall@2 = 1.0, i2t_recall@1 = 0.5 and i2t_recall@2 = 0.5.

    A wrong candidate that ties with the right one is placed before it: a model that finds everything equally similar
    scores 0 instead of 1. Without ties this is the top-k recall of CLIP_benchmark. Any k from the number of candidates
    on gives 1. Raises ValueError for NaN, for a k below 1, for shapes that disagree and for an image without a text.
    """
    return similarity_ranks(similarity, image_of_text).recalls(ks)


def similarity_ranks(similarity: Matrix, image_of_text: Tensor | Sequence[int]) -> Ranks:
    """Ranks by similarities (I, T); arguments and errors as for `recall_at_k`."""
    similarity = torch.as_tensor(similarity)
    labels = torch.as_tensor(image_of_text, device=similarity.device)
    images, image_of_text = _labels(len(similarity), labels)  # (I,), (T,)
    if similarity.ndim != 2 or similarity.shape[1] != len(image_of_text):
        raise ValueError(
            f"similarity must be (images, texts) with a column for each of the {len(image_of_text)} entries of "
            f"image_of_text, got {tuple(similarity.shape)}"
        )
    return Ranks(_ranks(similarity.T, image_of_text, images), _ranks(similarity, images, image_of_text), image_of_text)


def feature_ranks(image_features: Tensor, text_features: Tensor, image_of_text: Tensor, chunk: int = 1000) -> Ranks:
    """Ranks by the dot products of (I, D) and (T, D) features. Only ``chunk`` queries are compared with the candidates
    at a time, in float32: lower precision would create ties.
    """
    image_features = image_features.detach().float()
    text_features = text_features.detach().float()
    images, image_of_text = _labels(len(image_features), image_of_text.to(image_features.device))  # (I,), (T,)
    t2i = _chunked_ranks(text_features, image_features, image_of_text, images, chunk)
    i2t = _chunked_ranks(image_features, text_features, images, image_of_text, chunk)
    return Ranks(t2i, i2t, image_of_text)


def folded_ranks(image_features: Tensor, text_features: Tensor, image_of_text: Tensor, size: int) -> Ranks:
    """As `feature_ranks`, but of the first `size` images and their texts among themselves, of the next, and so on: the
    mean recalls of MS-COCO's five folds of 1,000. Images after the last whole fold are left out.
    """
    owners = image_of_text.to(image_features.device)
    parts = []
    for start in range(0, len(image_features) - size + 1, size):
        own = (owners >= start) & (owners < start + size)
        images = image_features[start : start + size]
        parts.append(feature_ranks(images, text_features[own], owners[own] - start))
    image_of = torch.cat([part.image_of_text + number * size for number, part in enumerate(parts)])
    return Ranks(torch.cat([part.t2i for part in parts]), torch.cat([part.i2t for part in parts]), image_of)


def check_numbers(similarity: Tensor) -> None:
    """Raises ValueError for NaN."""
    if similarity.isnan().any():
        raise ValueError("the similarities hold NaN, so nothing can be ranked; look for NaN in the model's features")


def _ranks(similarity_QC: Tensor, query_labels: Tensor, candidate_labels: Tensor) -> Tensor:
    """(Q,): how many candidates of another label come no later than the best one of the query's own; 0 is best."""
    check_numbers(similarity_QC)
    own_QC = query_labels[:, None] == candidate_labels
    best_Q1 = similarity_QC.masked_fill(~own_QC, -torch.inf).amax(dim=1, keepdim=True)
    return ((similarity_QC >= best_Q1) & ~own_QC).sum(dim=1)


def _chunked_ranks(queries: Tensor, candidates: Tensor, query_labels: Tensor, labels: Tensor, chunk: int) -> Tensor:
    parts = zip(torch.split(queries, chunk), torch.split(query_labels, chunk), strict=True)
    with torch.autocast(queries.device.type, enabled=False):  # a caller's mixed precision must not undo float32
        return torch.cat([_ranks(part_QD @ candidates.T, part_labels, labels) for part_QD, part_labels in parts])


def _labels(images: int, image_of_text: Tensor) -> tuple[Tensor, Tensor]:
    """The image numbers 0..I-1 that label images (I,) and texts (T,), checked: each image has a text and vice versa."""
    numbers = torch.arange(images, device=image_of_text.device)
    if image_of_text.ndim != 1 or image_of_text.is_floating_point() or not torch.isin(image_of_text, numbers).all():
        raise ValueError(f"image_of_text must hold one image number from 0 to {images - 1} for each text")
    textless = numbers[~torch.isin(numbers, image_of_text)].tolist()
    if textless or not images:
        raise ValueError(f"each image needs a text, but {len(textless)} of {images} have none, e.g. {textless[:5]}")
    return numbers, image_of_text
