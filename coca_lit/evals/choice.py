"""Image-text choice: right texts against wrong ones, by embeddings and by the decoder's likelihood."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.errors import DataError, check_number
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.inference import blind_log_likelihoods, embed_pairs, log_likelihoods
from coca_lit.metrics.choice import choice_accuracy, is_right, pair_accuracy
from coca_lit.metrics.uncertainty import Resampled, bootstrap, exact
from coca_lit.models import CoCa, DualEncoder


class ChoiceScores(Evaluation):
    """Accuracy of the choice of the right text for an image, by cosine. With `settings.full` also by the decoder:

    - "likelihood/…": log p(text | image). It favours texts that are likely beside any image, and so does well where
      wrong texts are odd.
    - "pmi/…": log p(text | image) - log p(text), which does not (Lin et al. 2023, arXiv 2306.01879).

    Where two texts are right, both must be above all wrong ones, and "text_only/…" asks the text side alone: are they
    closer to each other than to any wrong one?

    Args:
        records: the captions of each are the right texts and then the wrong ones; the domain is the kind of the case.
        paired: pairs of images follow each other, whose right texts are each other's wrong ones; the scores are those
            of Winoground.
        right: how many of the captions are right, 1 or 2.
    """

    captioned = True

    def __init__(
        self, name: str, records: Sequence[Record], paired: bool = False, right: int = 1, every: int = 1
    ) -> None:
        super().__init__(name, records, every)
        check_number("right", right, whole=True, at_least=1, at_most=1 if paired else 2)
        self.paired, self.right = paired, right
        names = exact(len(records), choice_accuracy(np.zeros(len(records)), [r.domain for r in records]))
        self.score_names = ("text_score", "image_score", "group_score") if paired else tuple(names)

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        if self.paired and len(records) < 2:
            raise DataError(f"{self.name} compares pairs of images: set scoring.images and scoring.quick to 2 or more")
        if self.paired:  # a last image whose other one has been cut off is left out
            records = records[: len(records) // 2 * 2]
        units = [record.id for record in records[:: 2 if self.paired else 1]]  # what an interval draws
        cosines, among_texts = _cosines(model, records, settings)
        ways = {"": cosines}
        if not settings.full:
            return exact(len(units), self._resampled(records, ways[""]))
        if model.decoder is None:
            self.not_run[f"{self.name} likelihood"] = "the model has no decoder to read the texts with"
        else:
            read, blind = _log_likelihoods(model, records, settings)
            ways["likelihood/"] = read
            ways["pmi/"] = [row - prior for row, prior in zip(read, blind, strict=True)]
        measured = {way: self._resampled(records, found) for way, found in ways.items()}
        if self.right == 2:
            alike = is_right([torch.cat([row[0, 1:2], row[:2, 2:].flatten()]) for row in among_texts])
            measured["text_only/"] = choice_accuracy(alike, [record.domain for record in records])
        for way, resampled in measured.items():
            draws = bootstrap(units, resampled)
            self.draws |= {f"{way}{score}": of for score, of in draws.items()}
        return {score: draws.score for score, draws in self.draws.items()}

    def depends_on(self, score: str, settings: Settings) -> dict[str, Any]:
        return {}

    def _resampled(self, records: Sequence[Record], found: Sequence[Tensor]) -> Resampled:
        if self.paired:
            return pair_accuracy(found)
        return choice_accuracy(is_right(found, self.right), [record.domain for record in records])


def _cosines(model: DualEncoder, records: Sequence[Record], settings: Settings) -> tuple[list[Tensor], list[Tensor]]:
    """Of each image (K,) with its texts, and (K, K) of its texts with each other."""
    images, texts, image_of_text = embed_pairs(model, records, settings.batch_size, settings.workers)
    cosines = (images[image_of_text] * texts).sum(dim=1)  # (T,)
    counts = [len(record.captions) for record in records]
    return list(cosines.split(counts)), [own @ own.T for own in texts.split(counts)]


def _log_likelihoods(
    model: CoCa, records: Sequence[Record], settings: Settings
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Of each image (K,) the log-likelihoods of its texts, with the image and without it."""
    texts = [caption for record in records for caption in record.captions]
    counts = [len(record.captions) for record in records]
    numbers = torch.arange(len(texts)).split(counts)
    size = settings.batch_size
    read = log_likelihoods(model, records, texts, lambda i: numbers[i].tolist(), size, settings.workers)
    return read, blind_log_likelihoods(model, texts, size).split(counts)
