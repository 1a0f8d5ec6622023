"""Image-text choice: right texts against wrong ones, by embeddings and by the decoder's likelihood. As in retrieval, a
tie is a wrong answer.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.errors import DataError, check_number
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.inference import blind_log_likelihoods, embed_pairs, log_likelihoods
from coca_lit.metrics.uncertainty import Ratios, Resampled, Units, bootstrap, exact
from coca_lit.models import DualEncoder


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
    generates = False

    def __init__(
        self, name: str, records: Sequence[Record], paired: bool = False, right: int = 1, every: int = 1
    ) -> None:
        super().__init__(name, records, every)
        check_number("right", right, whole=True, at_least=1, at_most=1 if paired else 2)
        self.paired = paired
        self.right = right
        if paired:
            self.score_names = ("text_score", "image_score", "group_score")
        else:
            images = len({record.image_key for record in records})
            self.score_names = tuple(exact(images, self._accuracy(np.zeros(len(records)), records)))

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        if self.paired:
            if len(records) < 2:
                raise DataError(
                    f"{self.name} compares pairs of images: set scoring.images and scoring.quick to 2 or more"
                )
            records = records[: len(records) // 2 * 2]  # without a last image whose other one has been cut off
            drawn = list(range(0, len(records), 2))  # an interval draws pairs,
        else:
            drawn = Units(record.image_key for record in records).first  # or images with all their cases
        units = [records[i].id for i in drawn]
        counts = [len(record.captions) for record in records]
        images, texts, image_of_text = embed_pairs(model, records, settings.batch_size, settings.workers)
        cosines = (images[image_of_text] * texts).sum(dim=1).split(counts)  # of each image (K,)
        if not settings.full:
            return exact(len(units), self._resampled(records, cosines))
        measured = {"": self._resampled(records, cosines)}
        if model.decoder is None:
            self.not_run[f"{self.name} likelihood"] = "the model has no decoder to read the texts with"
        else:
            captions = [caption for record in records for caption in record.captions]
            numbers = torch.arange(len(captions)).split(counts)
            read = log_likelihoods(
                model, records, captions, lambda i: numbers[i].tolist(), settings.batch_size, settings.workers
            )
            blind = blind_log_likelihoods(model, captions, settings.batch_size).split(counts)  # without the image
            gains = [row - prior for row, prior in zip(read, blind, strict=True)]
            measured["likelihood/"] = self._resampled(records, read)
            measured["pmi/"] = self._resampled(records, gains)
        if self.right == 2:
            among_texts = [own @ own.T for own in texts.split(counts)]  # (K, K) of each image
            alike = is_right([torch.cat([row[0, 1:2], row[:2, 2:].flatten()]) for row in among_texts])
            measured["text_only/"] = self._accuracy(alike, records)
        for way, resampled in measured.items():
            for score, draws in bootstrap(units, resampled).items():
                self.draws[way + score] = draws
        return {score: draws.score for score, draws in self.draws.items()}

    def _resampled(self, records: Sequence[Record], scores: Sequence[Tensor]) -> Resampled:
        if self.paired:
            return pair_accuracy(scores)
        return self._accuracy(is_right(scores, self.right), records)

    def _accuracy(self, right: np.ndarray, records: Sequence[Record]) -> "ChoiceAccuracy":
        return ChoiceAccuracy(right, [record.domain for record in records], [record.image_key for record in records])


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


class ChoiceAccuracy(Ratios):
    """ "accuracy" over all cases (N,); of cases with kinds also "KIND_accuracy" of each and their mean,
    "macro_accuracy".

    Args:
        images: of the cases; the units are the images, each with all its cases, in the order of their first ones.
            None: each case has its own.
    """

    def __init__(
        self, right: np.ndarray, kinds: Sequence[str | None], images: Sequence[Hashable] | None = None
    ) -> None:
        units = Units(images or range(len(right)))
        parts = {"accuracy": units.mean(right)}
        for kind in sorted({kind for kind in kinds if kind}):
            of_kind = np.array([own == kind for own in kinds])
            parts[f"{kind}_accuracy"] = units.mean(right, of_kind)
        super().__init__(parts)

    def __call__(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        kinds = super().__call__(counts)
        scores = {"accuracy": kinds.pop("accuracy")}
        if kinds:
            scores["macro_accuracy"] = np.nanmean(list(kinds.values()), axis=0)  # a resample may lack a kind
        return scores | kinds


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
    right = {"text_score": text, "image_score": image, "group_score": text & image}
    return lambda counts: {name: counts @ pair / counts.sum(axis=1) for name, pair in right.items()}
