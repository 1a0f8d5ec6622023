"""Retrieval scores, with samples for the report, decoder re-ranking, and queries with many right answers.

A dual encoder compares two embeddings. The decoder of the same model scores a text token by token while it attends to
all tokens of an image, log p(text | image): it sees more and costs a pass for every pair. So only pairs among each
other's nearest are re-ranked by it, as ALBEF does with a matching head (Li et al. 2021, arXiv 2107.07651).

A text that is likely beside any image says little about this one. So its likelihood is divided by its mean over the
images that it was scored with.

Shapes: I images, T texts, E embedding width.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coca_lit.data.datasets.retrieval import Positives
from coca_lit.data.records import Record
from coca_lit.distributed import print_rank_zero, rank
from coca_lit.errors import DataError, check_number
from coca_lit.evals import inference
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.inference import embed_pairs
from coca_lit.evals.samples import retrieval_samples, retrieval_sheet
from coca_lit.metrics.retrieval import KS, Ranks, feature_ranks, folded_ranks, positive_scores, similarity_ranks
from coca_lit.metrics.uncertainty import Draws, Ratios, Resampled, bootstrap
from coca_lit.models import CoCa, DualEncoder

UNREAD = ("cut_captions", "read_tokens")
BEHIND = 1e4  # further than any two scores are apart
CAPTIONS = 5  # of each image of `PositiveRetrieval`, as in all published numbers; ten of MS-COCO's test images have six


class RetrievalScores(Evaluation):
    """Recall@1/5/10 in both directions, with all captions of every image. With `settings.full` also samples and, with
    `settings.rerank`, recall after decoder re-ranking: `mscoco/reranked_t2i_recall@1`. Captions that are longer
    than the context lose their end; if there are any, "cut_captions" is their share and "read_tokens" that of tokens.
    Recalls in "folds/" are means over parts of the data set, each searched by itself.

    Args:
        rerank_weight: share of the decoder's score in re-ranking, between 0 and 1.
        fold: images of such a part, as many as follow each other; none if there are fewer than twice as many.
    """

    captioned = True
    score_names = (
        *(f"{way}_recall@{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)),
        *("t2i_median_rank", "i2t_median_rank"),
    )
    final_score_names = (
        *UNREAD,
        *(f"reranked_{name}" for name in score_names if "recall" in name),
        *(f"folds/{name}" for name in score_names if "recall" in name),
    )

    def __init__(
        self,
        name: str,
        records: Sequence[Record],
        rerank_weight: float = 0.5,
        fold: int | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(name, records, every)
        check_number("rerank_weight", rerank_weight, at_least=0, at_most=1)
        if fold is not None:
            check_number("fold", fold, whole=True, at_least=1)
        self.rerank_weight, self.fold = rerank_weight, fold

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        images, texts, image_of_text = embed_pairs(model, records, settings.batch_size, settings.workers)
        ranks = feature_ranks(images, texts, image_of_text)
        scores = ranks.recalls() | ranks.medians()
        if not settings.full:
            return scores
        if rank() == 0:
            samples = retrieval_samples(records, images, texts, image_of_text)
            settings.write_json("samples", f"{self.name}_retrieval.json", samples)
            sheet = retrieval_sheet(records, images, texts, image_of_text)
            settings.write_image("samples", f"{self.name}_retrieval.png", sheet)
        ids = [record.id for record in records]
        self.draws = bootstrap(ids, ranks.resampled()) | self._unread(model, records)
        scores |= {name: self.draws[name].score for name in UNREAD if name in self.draws}
        if self.fold is not None and len(records) >= 2 * self.fold:
            scores |= self._recalls("folds/", ids, folded_ranks(images, texts, image_of_text, self.fold))
        if not settings.rerank:
            return scores
        if model.decoder is None:
            self.not_run[f"{self.name} reranked recall"] = "the model has no decoder to re-rank with"
            return scores
        options = (settings.rerank, self.rerank_weight, settings.batch_size, settings.workers)
        reranked = similarity_ranks(decoder_rerank(model, records, images, texts, *options), image_of_text)
        return scores | self._recalls("reranked_", ids, reranked)

    def _recalls(self, prefix: str, ids: Sequence[int | str], ranks: Ranks) -> dict[str, float]:
        """Further recalls, of the first images or all, whose draws are noted."""
        recalls, draws = ranks.recalls(), bootstrap(ids[: len(ranks.i2t)], ranks.resampled())
        self.draws |= {f"{prefix}{name}": draws[name] for name in recalls}
        return {f"{prefix}{name}": value for name, value in recalls.items()}

    def depends_on(self, score: str, settings: Settings) -> dict[str, Any]:
        if score.startswith("folds/"):
            return {"fold": self.fold}
        reranked = score.startswith("reranked_")
        return {"rerank": settings.rerank, "rerank_weight": self.rerank_weight} if reranked else {}

    def _unread(self, model: DualEncoder, records: Sequence[Record]) -> dict[str, Draws]:
        """Which captions are longer than the context and lose their end; nothing if none is."""
        context = model.tokenizer.context_length
        lengths = [np.array(model.tokenizer.lengths(record.captions)) for record in records]
        cut = np.array([(own > context).sum() for own in lengths], dtype=np.float64)
        if not cut.any():
            return {}
        texts = np.array([len(own) for own in lengths], dtype=np.float64)
        tokens = np.array([own.sum() for own in lengths], dtype=np.float64)
        read = np.array([own.clip(max=context).sum() for own in lengths], dtype=np.float64)
        print_rank_zero(
            f"{cut.sum():.0f} of {texts.sum():.0f} captions of {self.name} are longer than the {context} tokens that "
            f"the model reads: their ends are cut, {read.sum() / tokens.sum():.0%} of all tokens are read"
        )
        parts = dict(zip(UNREAD, ((cut, texts), (read, tokens)), strict=True))
        return bootstrap([record.id for record in records], Ratios(parts))


def decoder_rerank(
    model: CoCa,
    records: Sequence[Record],
    image_features: Tensor,
    text_features: Tensor,
    candidates: int,
    weight: float,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Tensor:
    """Similarities (I, T) of images and all their captions, in float64, on the CPU of every rank.

    A candidate pair has (1 - weight) · exp(logit_scale) · cosine + weight · log (p(text | image) / p(text)); all other
    pairs follow behind, in the order of their cosines.

    Args:
        image_features, text_features: (I, E) and (T, E) of `embed_pairs`.
        candidates: nearest images of each text that the decoder scores; for each image, as many nearest texts as give
            both directions the same number of pairs.
        weight: share of the log-likelihood, between 0 and 1.
    """
    similarity = model.logit_scale.exp().item() * image_features @ text_features.T  # (I, T)
    found = log_likelihoods(model, records, candidate_pairs(similarity, candidates), batch_size, num_workers)
    return reranked(similarity, found, weight)


def reranked(similarity: Tensor, log_likelihood: Tensor, weight: float) -> Tensor:
    """Scores (I, T) of `decoder_rerank`, from similarities (I, T) and log-likelihoods (I, T) of the candidates; -inf
    marks all other pairs.
    """
    candidate = ~log_likelihood.isneginf()
    informative = log_likelihood - (log_likelihood.logsumexp(dim=0) - candidate.sum(dim=0).log())
    scores = (1 - weight) * similarity + weight * informative
    return torch.where(candidate, scores, similarity.double() - BEHIND)  # float32 would merge cosines that far out


def candidate_pairs(similarity: Tensor, candidates: int) -> Tensor:
    """Whether (I, T) the image is among the nearest of the text, or the text among the nearest of the image."""
    images, texts = similarity.shape
    pairs = torch.zeros_like(similarity, dtype=torch.bool)
    pairs.scatter_(0, similarity.topk(min(candidates, images), dim=0).indices, True)
    each = math.ceil(min(candidates, images) * texts / images)
    return pairs.scatter_(1, similarity.topk(each, dim=1).indices, True)


def log_likelihoods(
    model: CoCa, records: Sequence[Record], pairs: Tensor, batch_size: int = 64, num_workers: int = 0
) -> Tensor:
    """log p(text | image) (I, T) of the `pairs`, -inf elsewhere."""
    texts = [caption for record in records for caption in record.captions]
    rows = inference.log_likelihoods(
        model, records, texts, lambda i: pairs[i].nonzero()[:, 0].tolist(), batch_size, num_workers
    )
    found = torch.full(pairs.shape, -torch.inf)
    for i, values in enumerate(rows):
        found[i, pairs[i]] = values
    return found


class PositiveRetrieval(Evaluation):
    """Recall@1/5/10, R-precision and mAP@R in both directions, see `positive_scores`. Candidates are all images and the
    first five captions of each; queries are those that have a right answer among them.

    Args:
        positives: what describes what, see `coca_lit.data.datasets.retrieval`.
    """

    captioned = True
    generates = False
    score_names = tuple(
        f"{way}_{name}" for way in ("t2i", "i2t") for name in (*(f"recall@{k}" for k in KS), "r_precision", "map@r")
    )

    def __init__(self, name: str, records: Sequence[Record], positives: Positives, every: int = 1) -> None:
        cut = [record._replace(captions=record.captions[:CAPTIONS]) for record in records]
        super().__init__(name, cut, every)
        self.positives = positives
        for record in cut:
            if len(record.captions) > len(positives.captions.get(record.id, ())):
                raise DataError(
                    f"the captions of image {record.id!r} have no ids in dataset_coco.json: use the images that it "
                    "lists"
                )

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        images, texts, _ = embed_pairs(model, records, settings.batch_size, settings.workers)
        return self.resample([record.id for record in records], self.resampled(records, images, texts), settings)

    def resampled(self, records: Sequence[Record], images: Tensor, texts: Tensor) -> Resampled:
        """Means over the queries of drawn images, from features (I, E) and (T, E)."""
        place = {record.id: number for number, record in enumerate(records)}
        captions = [id for r in records for id in self.positives.captions[r.id][: len(r.captions)]]
        place_of_caption = {id: number for number, id in enumerate(captions)}
        owner = np.repeat(np.arange(len(records)), [len(record.captions) for record in records])
        asked: dict[str, tuple[Tensor, Tensor, list[Sequence[int]], Mapping[Any, int], np.ndarray]] = {
            "t2i": (texts, images, [self.positives.of_caption.get(id, ()) for id in captions], place, owner),
            "i2t": (
                images,
                texts,
                [self.positives.of_image.get(r.id, ()) for r in records],
                place_of_caption,
                np.arange(len(records)),
            ),
        }
        parts: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
        for way, (queries, candidates, right, places, unit) in asked.items():
            numbers = [[places[id] for id in ids if id in places] for ids in right]
            rows = [row for row, own in enumerate(numbers) if own]
            if not rows:
                raise DataError(f"{self.name} has no right answer among these images: raise scoring.images")
            total = np.bincount(unit[rows], minlength=len(records)).astype(np.float64)
            scores = positive_scores(queries[rows], candidates, [numbers[row] for row in rows])
            for name, values in scores.items():
                parts[f"{way}_{name}"] = np.bincount(unit[rows], weights=values, minlength=len(records)), total
        return Ratios(parts)
