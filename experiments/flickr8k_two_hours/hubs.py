"""Retrieval with fewer hubs: candidates that are near to everything come first for too many queries. So each similarity
is lessened by how near its candidate is to a bank of other queries, the training photos and captions (querybank
normalisation, Bogolin et al. 2022, arXiv 2112.12777, with the inverted softmax).

Shapes: I images, T texts of the records; B images, C captions of the bank; E embedding width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.errors import check_number
from coca_lit.evals.base import Settings
from coca_lit.evals.inference import embed_pairs
from coca_lit.evals.retrieval import (
    RetrievalScores,
    candidate_log_likelihoods,
    candidate_pairs,
    informative,
    mix_scores,
)
from coca_lit.metrics.retrieval import Ranks, similarity_ranks
from coca_lit.metrics.uncertainty import bootstrap
from coca_lit.models import DualEncoder


class BankedRetrieval(RetrievalScores):
    """Recall by normalised similarities and, with `settings.rerank`, after decoder re-ranking of the candidates that
    are nearest by them.

    Args:
        name, records, rerank_weight, every: as in `RetrievalScores`.
        bank: the training photos with their captions.
        sharpness: inverse temperature of the softmax over the bank, of cosines.
    """

    def __init__(
        self,
        name: str,
        records: Sequence[Record],
        bank: Sequence[Record],
        sharpness: float = 10.0,
        rerank_weight: float = 0.5,
        every: int = 1,
    ) -> None:
        super().__init__(name, records, rerank_weight, every=every)
        check_number("sharpness", sharpness, above=0)
        self.bank, self.sharpness = bank, sharpness

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        images, texts, image_of_text = embed_pairs(model, records, settings.batch_size, settings.workers)
        photos, captions, _ = embed_pairs(model, self.bank, settings.batch_size, settings.workers)
        ways = normalised(images, texts, photos, captions, self.sharpness)
        found = {"": _ranks(*ways, image_of_text)}
        if settings.rerank and model.decoder is not None:
            for_texts, for_images = (model.logit_scale.exp().item() * way for way in ways)
            near = [candidate_pairs(way, settings.rerank) for way in (for_texts, for_images)]
            read = candidate_log_likelihoods(model, records, near[0] | near[1], settings.batch_size, settings.workers)
            found["reranked_"] = _ranks(
                mix_scores(for_texts, informative(read.masked_fill(~near[0], -torch.inf)), self.rerank_weight),
                mix_scores(for_images, informative(read.masked_fill(~near[1], -torch.inf)), self.rerank_weight),
                image_of_text,
            )
        scores: dict[str, float] = {}
        for before, ranks in found.items():
            draws = bootstrap([record.id for record in records], ranks.resampled())
            self.draws |= {before + name: of for name, of in draws.items() if "recall" in name}
            scores |= {before + name: value for name, value in ranks.recalls().items()}
        return scores

    def depends_on(self, score: str, settings: Settings) -> dict[str, Any]:
        return super().depends_on(score, settings) | {"sharpness": self.sharpness}


def normalised(
    images: Tensor, texts: Tensor, photos: Tensor, captions: Tensor, sharpness: float
) -> tuple[Tensor, Tensor]:
    """Similarities (I, T) for texts that ask for an image, and for images that ask for a text: the cosine of a query q
    and a candidate c, less log Σ_b exp(sharpness · cos(b, c)) / sharpness over the queries b of the bank.

    Args:
        images, texts, photos, captions: features of unit length, (I, E), (T, E), (B, E) and (C, E).
    """
    cosines = images @ texts.T
    of_images = (sharpness * images @ captions.T).logsumexp(dim=1) / sharpness  # (I,)
    of_texts = (sharpness * photos @ texts.T).logsumexp(dim=0) / sharpness  # (T,)
    return cosines - of_images[:, None], cosines - of_texts


def _ranks(for_texts: Tensor, for_images: Tensor, image_of_text: Tensor) -> Ranks:
    """Texts ask with the first similarities (I, T), images with the second."""
    return similarity_ranks(for_images, image_of_text)._replace(t2i=similarity_ranks(for_texts, image_of_text).t2i)
