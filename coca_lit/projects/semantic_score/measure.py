"""Semantic scores of captions, see `coca_lit.evals.captions.Measure`."""

from collections.abc import Mapping, Sequence

import numpy as np

from coca_lit.data.records import Listing, Record
from coca_lit.metrics.uncertainty import Parts
from coca_lit.projects.semantic_score.encoder import sentence_encoder


def semantic_scores(records: Sequence[Record | Listing], captions: Mapping[int | str, str]) -> Parts:
    """For each image the cosine of its caption and the nearest reference, "semantic_best", and the mean of the cosines
    with all references, "semantic_mean".

    Raises:
        DataError: the sentence encoder is not installed.
    """
    encode = sentence_encoder()
    written = encode([captions[record.id] for record in records])  # (I, E)
    references = encode([text for record in records for text in record.captions])  # (R, E)
    best: list[float] = []
    mean: list[float] = []
    groups = references.split([len(record.captions) for record in records])
    for caption, group in zip(written, groups, strict=True):
        cosines = group @ caption
        best.append(cosines.max().item())
        mean.append(cosines.mean().item())
    return {"semantic_best": (np.array(best), None), "semantic_mean": (np.array(mean), None)}
