"""How the members are scored: captions and cosines along the way, and what the decoder alone retrieves and classifies,
which members without a contrastive loss do, too.
"""

from collections.abc import Sequence
from statistics import mean

import torch
from torch import Tensor

from coca_lit.data.datasets.classification import Classification, scene_classes
from coca_lit.data.records import Record
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.inference import embed_pairs, embed_texts, evaluating, write_texts
from coca_lit.evals.retrieval import rerank
from coca_lit.metrics.captions import caption_scores, is_reference
from coca_lit.metrics.java.runtime import ptb_tokenize
from coca_lit.metrics.retrieval import feature_ranks, similarity_ranks
from coca_lit.models import CoCa, DualEncoder
from coca_lit.models.inputs import Images


class CaptionsAndCosines(Evaluation):
    """Greedy captions and recall@1 by cosines, with one pass through the image encoder.

    Args:
        tokenized: the captions are words with a blank between them, so that there is nothing to tokenize.
    """

    def __init__(self, name: str, records: Sequence[Record], tokenized: bool = False, every: int = 1) -> None:
        super().__init__(name, records, every)
        self.tokenize = list if tokenized else ptb_tokenize

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        assert isinstance(model, CoCa)
        features: list[Tensor] = []

        def write(_: Sequence[Record], images: Images) -> list[str]:
            with evaluating(model):
                encoded = model.image_encoder(images)
                features.append(model.encode_image(encoded))
            return [model.tokenizer.decode(row) for row in model.generate(encoded)]

        captions = write_texts(model, records, write, settings.batch_size, settings.workers)
        references = {record.id: record.captions for record in records}
        texts = embed_texts(model, [text for group in references.values() for text in group], settings.batch_size)
        image_of_text = torch.tensor([i for i, record in enumerate(records) for _ in record.captions])
        return {
            **caption_scores(references, captions, ("Bleu", "CIDEr"), self.tokenize),
            "exact_match": mean(is_reference(captions[key], group) for key, group in references.items()),
            **feature_ranks(torch.cat(features), texts, image_of_text).recalls([1]),
        }


class DecoderRetrieval(Evaluation):
    """Recall@1 among images and the first caption of each, by cosines and by the decoder, which reads every pair.

    Args:
        images: how many; the decoder reads as many captions beside each of them.
    """

    def __init__(self, name: str, records: Sequence[Record], images: int = 128, every: int = 0) -> None:
        super().__init__(name, [r._replace(captions=r.captions[:1]) for r in records[:images]], every)

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        assert isinstance(model, CoCa)
        images, texts, image_of_text = embed_pairs(model, records, settings.batch_size, settings.workers)
        read = rerank(model, records, images, texts, len(records), 1.0, settings.batch_size, settings.workers)
        return {
            f"{way}_{name}": value
            for way, similarity in (("cosine", images @ texts.T), ("decoder", read))
            for name, value in similarity_ranks(similarity, image_of_text).recalls([1]).items()
        }


def scene_kinds(size: int = 32) -> Classification:
    """`scene_classes` with four prompts: the decoder reads every prompt beside every image."""
    classes = scene_classes(size)
    first_wording = classes.templates[::5]
    return classes._replace(templates=tuple(t for t in first_wording if "small" in t and "large" in t))
