"""Retrieval where a query has many right answers.

Shapes: I images, T texts, E embedding width, Q queries, C candidates.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.errors import DataError
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.inference import embed_pairs
from coca_lit.metrics.retrieval import KS, check_numbers
from coca_lit.metrics.uncertainty import Ratios, Resampled
from coca_lit.models import DualEncoder
from coca_lit.projects.retrieval_sets.positives import Positives

CAPTIONS = 5  # of each image, as in all published numbers; ten of MS-COCO's test images have six
SCORES = (*(f"recall@{k}" for k in KS), "r_precision", "map@r")


class PositiveRetrieval(Evaluation):
    """Recall@1/5/10, R-precision and mAP@R in both directions, see `positive_scores`. Candidates are all images and the
    first five captions of each; queries are those that have a right answer among them.

    Args:
        positives: what describes what.
    """

    captioned = True
    generates = False
    score_names = tuple(f"{way}_{name}" for way in ("t2i", "i2t") for name in SCORES)

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
        of_caption = self.positives.of_caption
        of_image = self.positives.of_image
        image_ids = [record.id for record in records]
        caption_ids: list[int] = []
        image_of_caption: list[int] = []
        for number, record in enumerate(records):
            own = self.positives.captions[record.id][: len(record.captions)]
            caption_ids += own
            image_of_caption += [number] * len(own)
        right_images = _places([of_caption.get(id, ()) for id in caption_ids], image_ids)
        right_captions = _places([of_image.get(id, ()) for id in image_ids], caption_ids)
        t2i = self._parts("t2i", texts, images, right_images, np.array(image_of_caption), len(records))
        i2t = self._parts("i2t", images, texts, right_captions, np.arange(len(records)), len(records))
        return Ratios(t2i | i2t)

    def _parts(
        self, way: str, queries: Tensor, candidates: Tensor, right: list[list[int]], image: np.ndarray, images: int
    ) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
        """For `Ratios`, the scores of queries that have a right answer, summed over the queries of each image.

        Args:
            right: of each query the numbers of its right answers.
            image: (Q,) of the queries.
            images: how many there are.
        """
        asked = [query for query, answers in enumerate(right) if answers]
        if not asked:
            raise DataError(f"{self.name} has no right answer among these images: raise scoring.images")
        queries_of_image = np.bincount(image[asked], minlength=images).astype(np.float64)
        scores = positive_scores(queries[asked], candidates, [right[query] for query in asked])
        return {
            f"{way}_{name}": (np.bincount(image[asked], weights=values, minlength=images), queries_of_image)
            for name, values in scores.items()
        }


def _places(answers: Sequence[Sequence[Hashable]], candidates: Sequence[Hashable]) -> list[list[int]]:
    """The numbers of the right answers to each query, as far as they are among the candidates."""
    place: Mapping[Hashable, int] = {id: number for number, id in enumerate(candidates)}
    return [[place[id] for id in ids if id in place] for ids in answers]


def positive_scores(
    queries: Tensor, candidates: Tensor, positives: Sequence[Sequence[int]], ks: Sequence[int] = KS, chunk: int = 1000
) -> dict[str, np.ndarray]:
    """Scores (Q,) of queries (Q, D) that may have several right answers among the candidates (C, D): whether one is
    among the k most similar ("recall@k"); of the R most similar, R being the number of right answers, the share that is
    right ("r_precision"); and mean average precision at R (Musgrave et al. 2020, arXiv 2003.08505; "map@r").

    A wrong candidate that ties with a right one is placed before it.

    Args:
        positives: of each query the numbers of its right answers, one or more.

    Raises:
        ValueError: NaN, or a query without a right answer.
    """
    queries = queries.detach().float()
    candidates = candidates.detach().float()
    found: dict[str, list[float]] = {name: [] for name in (*(f"recall@{k}" for k in ks), "r_precision", "map@r")}
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ candidates.T  # (q, C)
        check_numbers(similarity)
        for row, right in zip(similarity.cpu().numpy(), positives[start : start + chunk], strict=True):
            numbers = np.unique(np.asarray(right, dtype=np.int64))
            if not len(numbers):
                raise ValueError("each query needs one or more right answers")
            own = np.sort(row[numbers])[::-1]  # (R,)
            order = np.arange(len(own))
            rivals = np.delete(row, numbers)
            place = (rivals >= own[:, None]).sum(axis=1) + order  # (R,) of each right answer, 0 is best
            within = place < len(own)
            for k in ks:
                found[f"recall@{k}"].append(float(place[0] < k))
            found["r_precision"].append(within.mean())
            found["map@r"].append((within * (order + 1) / (place + 1)).sum() / len(own))
    return {name: np.array(values) for name, values in found.items()}
