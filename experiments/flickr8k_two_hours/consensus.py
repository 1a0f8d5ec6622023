"""Captions by consensus: of several beams the one that is most like the training captions nearest to the photo.

Devlin et al. 2015 (arXiv 1505.04467) choose so among the captions of similar photos; here a caption is near whose text
features are near the image features, so that no training photo is needed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.errors import check_number
from coca_lit.evals.base import Settings
from coca_lit.evals.captions import CaptionScores
from coca_lit.evals.inference import embed_texts, evaluating, write_texts
from coca_lit.models import CoCa
from coca_lit.models.inputs import Images
from coca_lit.projects.rewards.cider import CiderD, fast_words


class ConsensusCaptions(CaptionScores):
    """Scores of the best of `scoring.generate.num_beams` beams: that with the highest mean CIDEr-D to the nearest
    training captions, each of which is a document of the document frequencies.

    Args:
        name, records, training_captions, every: as in `CaptionScores`.
        neighbours: how many training captions the beams are compared with.
    """

    def __init__(
        self,
        name: str,
        records: Sequence[Record],
        training_captions: Callable[[], Sequence[str]],
        neighbours: int = 150,
        every: int = 1,
    ) -> None:
        super().__init__(name, records, training_captions, every=every)
        check_number("neighbours", neighbours, at_least=1)
        self.neighbours = neighbours

    def depends_on(self, score: str, settings: Settings) -> dict[str, Any]:
        return super().depends_on(score, settings) | {"neighbours": self.neighbours}

    def write(self, model: CoCa, records: Sequence[Record], settings: Settings) -> dict[int | str, str]:
        assert self.training_captions is not None
        known = self.training_captions()
        cider = CiderD({i: [fast_words(caption)] for i, caption in enumerate(known)})
        features = embed_texts(model, known, settings.batch_size)  # (T, E)
        options = {"strategy": "beam", "num_beams": 8, **(settings.generate or {})}
        options["num_captions"] = options["num_beams"]

        def best(nearest: Sequence[int], beams: Tensor) -> str:
            """The text of one of the beams (N, L)."""
            texts = [model.tokenizer.decode(ids) for ids in beams]
            words = [fast_words(text) for text in texts]
            return texts[np.mean([cider(i, words) for i in nearest], axis=0).argmax()]

        def write(_: Sequence[Record], images: Images) -> list[str]:
            with evaluating(model):
                similarities = model.encode_image(images).float().cpu() @ features.T  # (B, T)
            nearest = similarities.topk(min(self.neighbours, len(known))).indices.tolist()
            return list(map(best, nearest, model.generate(images, **options)))

        return write_texts(model, records, write, settings.batch_size, settings.workers)
