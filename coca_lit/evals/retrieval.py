"""Retrieval scores, with samples for the report, and re-ranking of the nearest by another comparison.

A dual encoder compares two embeddings. The decoder of the same model scores a text token by token while it attends to
all tokens of an image, log p(text | image): it sees more and costs a pass for every pair. So only pairs among each
other's nearest are re-ranked by it, as ALBEF does with a matching head (Li et al. 2021, arXiv 2107.07651).

A text that is likely beside any image says little about this one. So its likelihood is divided by its mean over the
images that it was scored with.

Shapes: I images, T texts, E embedding width.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.distributed import gather_objects, print_rank_zero, rank
from coca_lit.errors import check_number
from coca_lit.evals.base import Evaluation, NotRunError, Settings
from coca_lit.evals.inference import embed_pairs, evaluating, image_batches, log_likelihoods
from coca_lit.evals.samples import retrieval_samples, retrieval_sheet
from coca_lit.metrics.retrieval import Ranks, feature_ranks, folded_ranks, similarity_ranks
from coca_lit.metrics.uncertainty import Draws, Ratios, bootstrap
from coca_lit.models import CoCa, DualEncoder
from coca_lit.models.inputs import Images

UNREAD = ("cut_captions", "read_tokens")
BEHIND = 1e4  # further than any two scores are apart


class Comparison:
    """Scores the nearest images and texts in the place of the decoder. A subclass says what it compares of an image and
    of a text, which is computed once for each, and compares them. All methods are called without gradients and with
    the model in evaluation mode.
    """

    def check(self, model: DualEncoder) -> None:
        """Called once before the others, on every rank.

        Raises:
            NotRunError: the model lacks what the comparison needs, such as an objective, see `required_objective`.
        """

    def encode_images(self, model: DualEncoder, images: Images) -> Tensor:
        """What is compared of images (B, 3, H, W), a row for each (B, …): here their vectors (B, E) of unit length."""
        return model.encode_image(images)

    def encode_texts(self, model: DualEncoder, tokens: Tensor) -> Tensor:
        """What is compared of the tokens (N, L) of texts, a row for each (N, …): here their vectors (N, E) of unit
        length. The rows of all texts are held on the device.
        """
        return model.encode_text(tokens)

    def compare(self, model: DualEncoder, images: Tensor, texts: Tensor) -> Tensor:
        """Scores (B, N) of B rows of images and N rows of texts, on the scale of the similarities of the network,
        exp(logit_scale) · cosine.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method compare(model, images, texts)")


class RetrievalScores(Evaluation):
    """Recall@1/5/10 in both directions, with all captions of every image. With `settings.full` also samples and, with
    `rerank`, recall after re-ranking by the decoder: `mscoco/reranked_t2i_recall@1`. Captions that are longer
    than the context lose their end; if there are any, "cut_captions" is their share and "read_tokens" that of tokens.
    Recalls in "folds/" are means over parts of the data set, each searched by itself.

    Args:
        rerank: how many images are re-ranked for each text, 0 for none; None for `settings.rerank`.
        rerank_weight: share of the decoder's score in re-ranking, between 0 and 1.
        comparison: re-ranks in the place of the decoder.
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
        comparison: Comparison | None = None,
        rerank: int | None = None,
    ) -> None:
        super().__init__(name, records, every)
        check_number("rerank_weight", rerank_weight, at_least=0, at_most=1)
        if rerank is not None:
            check_number("rerank", rerank, whole=True, at_least=0)
        if fold is not None:
            check_number("fold", fold, whole=True, at_least=1)
        self.rerank_weight = rerank_weight
        self.fold = fold
        self.comparison = comparison
        self.rerank = rerank

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        images, texts, image_of_text = embed_pairs(model, records, settings.batch_size, settings.workers)
        ranks = feature_ranks(images, texts, image_of_text)
        scores = ranks.scores()
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
        candidates = self._candidates(settings)
        if not candidates:
            return scores
        size, workers, weight = settings.batch_size, settings.workers, self.rerank_weight
        try:
            similarity = rerank(model, records, images, texts, candidates, weight, size, workers, self.comparison)
        except NotRunError as reason:
            self.not_run[f"{self.name} reranked recall"] = str(reason)
            return scores
        return scores | self._recalls("reranked_", ids, similarity_ranks(similarity, image_of_text))

    def _candidates(self, settings: Settings) -> int:
        """How many images are re-ranked for each text."""
        return settings.rerank if self.rerank is None else self.rerank

    def _recalls(self, prefix: str, ids: Sequence[int | str], ranks: Ranks) -> dict[str, float]:
        """Further recalls, of the first images or all, whose draws are noted."""
        recalls = ranks.recalls()
        draws = bootstrap(ids[: len(ranks.i2t)], ranks.resampled())
        self.draws |= {f"{prefix}{name}": draws[name] for name in recalls}
        return {f"{prefix}{name}": value for name, value in recalls.items()}

    def depends_on(self, score: str, settings: Settings) -> dict[str, Any]:
        if score.startswith("folds/"):
            return {"fold": self.fold}
        if not score.startswith("reranked_"):
            return {}
        options: dict[str, Any] = {"rerank": self._candidates(settings), "rerank_weight": self.rerank_weight}
        if self.comparison is not None:
            kind = type(self.comparison)
            options["comparison"] = f"{kind.__module__}.{kind.__qualname__}"
        return options

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


def rerank(
    model: DualEncoder,
    records: Sequence[Record],
    image_features: Tensor,
    text_features: Tensor,
    candidates: int,
    weight: float,
    batch_size: int = 64,
    num_workers: int = 0,
    comparison: Comparison | None = None,
) -> Tensor:
    """Similarities (I, T) of images and all their captions, in float64, on the CPU of every rank.

    A candidate pair has (1 - weight) · exp(logit_scale) · cosine + weight · score, where the decoder's score is
    log (p(text | image) / p(text)); all other pairs follow behind, in the order of their cosines.

    Args:
        image_features, text_features: (I, E) and (T, E) of `embed_pairs`.
        candidates: nearest images of each text that are scored; for each image, as many nearest texts as give both
            directions the same number of pairs.
        weight: share of the score, between 0 and 1.
        comparison: gives the score; None for the decoder.

    Raises:
        NotRunError: the model has no decoder, or lacks what the comparison needs.
    """
    if comparison is not None:
        comparison.check(model)
    elif model.decoder is None:
        raise NotRunError("the model has no decoder to re-rank with")
    similarity = model.logit_scale.exp().item() * image_features @ text_features.T  # (I, T)
    pairs = candidate_pairs(similarity, candidates)
    if comparison is not None:
        scores = compared(model, records, pairs, comparison, batch_size, num_workers)
    else:
        assert isinstance(model, CoCa)  # a CLIP has no decoder
        scores = informative(candidate_log_likelihoods(model, records, pairs, batch_size, num_workers))
    return mix_scores(similarity, scores, weight)


def informative(log_likelihood: Tensor) -> Tensor:
    """log (p(text | image) / p(text)) (I, T), p(text) being the mean over the images that the text was read with; -inf
    marks pairs that were not read.
    """
    read = ~log_likelihood.isneginf()
    mean = log_likelihood.logsumexp(dim=0) - read.sum(dim=0).log()  # (T,)
    return torch.where(read, log_likelihood - mean, -torch.inf)


def mix_scores(similarity: Tensor, scores: Tensor, weight: float) -> Tensor:
    """Similarities (I, T) of `rerank`, from those of the features (I, T) and scores (I, T) of the candidates, with -inf
    for all other pairs.
    """
    both = (1 - weight) * similarity + weight * scores
    behind = similarity.double() - BEHIND  # float32 would merge cosines that far out
    return torch.where(scores.isneginf(), behind, both)


def candidate_pairs(similarity: Tensor, candidates: int) -> Tensor:
    """Whether (I, T) the image is among the nearest of the text, or the text among the nearest of the image."""
    images, texts = similarity.shape
    pairs = torch.zeros_like(similarity, dtype=torch.bool)
    pairs.scatter_(0, similarity.topk(min(candidates, images), dim=0).indices, True)
    each = math.ceil(min(candidates, images) * texts / images)
    return pairs.scatter_(1, similarity.topk(each, dim=1).indices, True)


def candidate_log_likelihoods(
    model: CoCa, records: Sequence[Record], pairs: Tensor, batch_size: int = 64, num_workers: int = 0
) -> Tensor:
    """log p(text | image) (I, T) of the `pairs`, -inf elsewhere."""
    texts = [caption for record in records for caption in record.captions]
    rows = log_likelihoods(model, records, texts, lambda i: pairs[i].nonzero()[:, 0].tolist(), batch_size, num_workers)
    found = torch.full(pairs.shape, -torch.inf)
    for i, values in enumerate(rows):
        found[i, pairs[i]] = values
    return found


def compared(
    model: DualEncoder,
    records: Sequence[Record],
    pairs: Tensor,
    comparison: Comparison,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Tensor:
    """What the comparison says (I, T) of the `pairs`, -inf elsewhere; on the CPU of every rank. It compares one image
    with at most `batch_size` texts at a time.
    """
    captions = [caption for record in records for caption in record.captions]
    tokens = model.tokenizer.tokens_of(captions).to(model.device)  # (T, L)
    of_rank: list[tuple[int, Tensor]] = []
    with evaluating(model):
        texts = torch.cat([comparison.encode_texts(model, part) for part in tokens.split(batch_size)])  # (T, …)
        for positions, pixels in image_batches(model, records, batch_size, num_workers):
            images = comparison.encode_images(model, pixels)  # (B, …)
            for row, position in enumerate(positions):
                image = images[row : row + 1]
                parts = texts[pairs[position].to(texts.device)].split(batch_size)
                rows = [comparison.compare(model, image, part) for part in parts]  # (1, n)
                of_rank.append((position, torch.cat(rows, dim=1)[0].float().cpu()))
    scores = torch.full(pairs.shape, -torch.inf)
    for part in gather_objects(of_rank):
        for position, values in part:
            scores[position, pairs[position]] = values
    return scores
