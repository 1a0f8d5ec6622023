"""Image-text retrieval by counting ranks: how many of the others does the model place before the right one?

The ground truth is an index, ``image_of_text[t]``, so images may have any number of captions.
Shapes: I images, T texts, D features, Q queries, C candidates.
"""

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from coca_lit.metrics.rows import Id, RowMetric, in_order, plain_ids
from coca_lit.metrics.uncertainty import Resampled

KS = (1, 5, 10)
ALIKE = 0.99  # cosine of features of the same sample in different batches; low precision costs less than this


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
        both = {"t2i": self.t2i, "i2t": self.i2t}
        return {f"{name}_recall@{k}": (ranks < k).sum().item() / len(ranks) for name, ranks in both.items() for k in ks}

    def medians(self) -> dict[str, float]:
        """Median ranks; 1 is best."""
        return {f"{name}_median_rank": 1.0 + float(median(getattr(self, name).tolist())) for name in ("t2i", "i2t")}

    def resampled(self, ks: Sequence[int] = KS) -> Resampled:
        """Recalls and median ranks of images that are drawn with replacement, each with its texts. The candidates stay:
        what varies is what is asked for.
        """
        owner = self.image_of_text.cpu().numpy()
        ranks = {"t2i": self.t2i.cpu().numpy(), "i2t": self.i2t.cpu().numpy()}
        image_of = {"t2i": owner, "i2t": np.arange(len(self.i2t))}

        def resampled(counts: np.ndarray) -> dict[str, np.ndarray]:
            values = {}
            for name, image in image_of.items():
                queries = counts @ np.bincount(image, minlength=len(self.i2t))
                for k in ks:
                    found = np.bincount(image, weights=ranks[name] < k, minlength=len(self.i2t))
                    values[f"{name}_recall@{k}"] = counts @ found / queries
                order = np.argsort(ranks[name], kind="stable")
                reached = counts[:, image[order]].cumsum(axis=1)  # (D, Q)
                middle = [(reached <= (queries[:, None] - half) // 2).sum(axis=1) for half in (1, 0)]
                lower, upper = (ranks[name][order][m] for m in middle)
                values[f"{name}_median_rank"] = 1 + (lower + upper) / 2
            return values

        return resampled


def recall_at_k(similarity: Tensor, image_of_text: Tensor | Sequence[int], ks: Sequence[int] = KS) -> dict[str, float]:
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


def similarity_ranks(similarity: Tensor, image_of_text: Tensor | Sequence[int]) -> Ranks:
    """Ranks by similarities (I, T); arguments and errors as for `recall_at_k`."""
    labels = torch.as_tensor(image_of_text, device=similarity.device)
    images, image_of_text = _labels(len(similarity), labels)  # (I,), (T,)
    if similarity.ndim != 2 or similarity.shape[1] != len(image_of_text):
        raise ValueError(
            f"similarity must be (images, texts) with a column for each of the {len(image_of_text)} entries of "
            f"image_of_text, got {tuple(similarity.shape)}"
        )
    return Ranks(_ranks(similarity.T, image_of_text, images), _ranks(similarity, images, image_of_text), image_of_text)


def retrieval_scores(
    image_features: Tensor,
    text_features: Tensor,
    image_of_text: Tensor | Sequence[int],
    ks: Sequence[int] = KS,
    chunk: int = 1000,
) -> dict[str, float]:
    """``recall_at_k`` of the dot products of (I, D) and (T, D) features, and median ranks (1 is best).

    Adds ``t2i_median_rank`` and ``i2t_median_rank``. Normalise the features first for cosine similarity.
    """
    ranks = feature_ranks(image_features, text_features, image_of_text, chunk)
    return ranks.recalls(ks) | ranks.medians()


def feature_ranks(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor | Sequence[int], chunk: int = 1000
) -> Ranks:
    """Ranks by the dot products of (I, D) and (T, D) features. Only ``chunk`` queries are compared with the candidates
    at a time, in float32: lower precision would create ties.
    """
    image_features, text_features = image_features.detach().float(), text_features.detach().float()
    owners = torch.as_tensor(image_of_text, device=image_features.device)
    images, image_of_text = _labels(len(image_features), owners)  # (I,), (T,)
    if image_features.ndim != 2 or text_features.shape != (len(image_of_text), image_features.shape[-1]):
        raise ValueError(
            f"expected image features (I, D) and text features ({len(image_of_text)}, D), one row for each entry of "
            f"image_of_text; got {tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    t2i = _chunked_ranks(text_features, image_features, image_of_text, images, chunk)
    i2t = _chunked_ranks(image_features, text_features, images, image_of_text, chunk)
    return Ranks(t2i, i2t, image_of_text)


class RecallAtK(RowMetric):
    """Recall in both directions and median ranks, of features that are computed batch by batch on any number of
    processes.

        class Retriever(L.LightningModule):
            def __init__(self):
                ...
                self.recall = RecallAtK(ks=(1, 5))

            def validation_step(self, batch, batch_idx):
                images, texts = self.encode(batch)  # (B, D) and (T, D), of unit length
                self.recall.update(images, texts, batch.image_ids, batch.image_id_of_text)

            def on_validation_epoch_end(self):
                self.log_dict(self.recall.compute())  # {"t2i_recall@1": ..., "i2t_recall@1": ..., ...}
                self.recall.reset()

    Args:
        ks: numbers of candidates, as in `recall_at_k`.
    """

    def __init__(self, ks: Sequence[int] = KS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ks = tuple(ks)
        for kind in ("image", "text"):
            self.add_rows(f"{kind}_ids")
            self.add_rows(f"{kind}_features", torch.float32)

    def update(
        self,
        image_features: Tensor,
        text_features: Tensor,
        image_ids: Sequence[Id] | Tensor,
        image_of_text: Sequence[Id] | Tensor | None = None,
        text_ids: Sequence[Id] | Tensor | None = None,
    ) -> None:
        """A batch of B images and T texts.

        Args:
            image_features, text_features: (B, D) and (T, D). Normalise them for cosine similarity.
            image_ids: the id of each image. An image may come again, with further texts.
            image_of_text: the id of the image that each text describes; None: text i describes image i.
            text_ids: the id of each text, unique among the texts of its image. None: texts are numbered within the
                batch, which is right if all texts of an image come in one batch.
        """
        if image_features.ndim != 2 or text_features.ndim != 2 or image_features.shape[1] != text_features.shape[1]:
            raise ValueError(
                f"expected image features (B, D) and text features (T, D), got {tuple(image_features.shape)} and "
                f"{tuple(text_features.shape)}"
            )
        images = plain_ids(image_ids, len(image_features))
        owners = plain_ids(images if image_of_text is None else image_of_text, len(text_features))
        if text_ids is None:
            seen: Counter[Id] = Counter()
            numbers: list[Id] = []
            for owner in owners:
                numbers.append(seen[owner])
                seen[owner] += 1
        else:
            numbers = plain_ids(text_ids, len(text_features))
        self.append("image_ids", images)
        self.append("text_ids", zip(owners, numbers, strict=True))
        self.append("image_features", image_features.detach().float().flatten())
        self.append("text_features", text_features.detach().float().flatten())

    def compute(self) -> dict[str, float]:
        """`retrieval_scores` of all images and texts, each counted once.

        Raises:
            ValueError: no samples, NaN in the features, an image without a text or a text without its image, or one
                text id for different texts of an image.
        """
        images, image_features = self._unique("image")
        texts, text_features = self._unique("text")
        numbers = {id: i for i, id in enumerate(images)}
        if orphans := [owner for owner, _ in texts if owner not in numbers]:
            raise ValueError(f"there is a text of the image {orphans[0]!r}, but the image itself was never given")
        image_of_text = torch.tensor([numbers[owner] for owner, _ in texts], device=text_features.device)
        return retrieval_scores(image_features, text_features, image_of_text, self.ks)

    def _unique(self, kind: str) -> tuple[list[Any], Tensor]:
        """Ids in order, each once, and their features (N, D)."""
        rows = [tuple(row) if isinstance(row, list) else row for row in self.rows(f"{kind}_ids")]
        if not rows:
            raise ValueError("there are no images and texts to score: call update first")
        features = dim_zero_cat(getattr(self, f"{kind}_features")).view(len(rows), -1)  # (N, D)
        first: dict[Any, int] = {}
        for row, id in enumerate(rows):
            same = first.setdefault(id, row)
            if same != row and torch.cosine_similarity(features[same], features[row], dim=0) < ALIKE:
                raise ValueError(f"the {kind} id {id!r} has different features: give different {kind}s different ids")
        ids = sorted(first, key=lambda id: tuple(map(in_order, id)) if isinstance(id, tuple) else in_order(id))
        return ids, features[[first[id] for id in ids]]


def _ranks(similarity_QC: Tensor, query_labels: Tensor, candidate_labels: Tensor) -> Tensor:
    """(Q,): how many candidates of another label come no later than the best one of the query's own; 0 is best."""
    if similarity_QC.isnan().any():
        raise ValueError("the similarities hold NaN, so nothing can be ranked; look for NaN in the model's features")
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
