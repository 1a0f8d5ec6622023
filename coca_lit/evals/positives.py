"""Retrieval where a query may have many right answers: CrissCrossed Captions and ECCV Caption."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from coca_lit.data.datasets.positives import Positives
from coca_lit.data.records import Record
from coca_lit.errors import DataError
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.inference import embed_pairs
from coca_lit.metrics.retrieval import KS, positive_scores
from coca_lit.metrics.uncertainty import Resampled, bootstrap, exact, ratios
from coca_lit.models import DualEncoder

CAPTIONS = 5  # of each image, as in all published numbers; ten of MS-COCO's test images have a sixth


class PositiveRetrieval(Evaluation):
    """Recall@1/5/10, R-precision and mAP@R in both directions, see `positive_scores`. Candidates are all images and the
    first five captions of each; queries are those that have a right answer among them.

    Args:
        positives: what describes what, see `coca_lit.data.datasets.positives`.
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
                    f"the captions of image {record.id!r} have no ids in dataset_coco.json: take its images"
                )

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        images, texts, _ = embed_pairs(model, records, settings.batch_size, settings.workers)
        found = self.resampled(records, images, texts)
        if not settings.full:
            return exact(len(records), found)
        self.draws = bootstrap([record.id for record in records], found)
        return {score: draws.score for score, draws in self.draws.items()}

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
        return ratios(parts)
