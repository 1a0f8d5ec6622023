"""An objective with parameters and a buffer, which is kept with the model."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.data.batch import Batch
from coca_lit.data.records import Record
from coca_lit.evals import Evaluation, Settings
from coca_lit.evals.inference import rows_of
from coca_lit.models import CoCa, CoCaOutput, register_objective
from coca_lit.training.objectives import Objective


@register_objective("words_of_images")
class WordsOfImages(Objective):
    """The pooled vector of an image predicts which words its caption has, as in SuperCLIP (arXiv 2512.14480)."""

    needs = ("pooled",)
    steps: Tensor

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(words=weight)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @property
    def config(self) -> dict[str, Any]:
        return {"weight": self.weights["words"]}

    def build(self, net: CoCa) -> None:
        self.head = nn.Linear(net.pooling.vector_width, net.tokenizer.vocab_size)

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        if self.training:
            self.steps += 1
        logits = self.head(out.pooled)
        targets = torch.zeros_like(logits).scatter_(1, batch.tokens, 1.0)
        targets[:, net.tokenizer.pad_id] = 0
        return {"words": -(F.log_softmax(logits, dim=1) * targets).sum(dim=1).mean()}


class LikeliestWords(Evaluation):
    """The share of images whose likeliest word their caption has, by the objective that is kept with the model."""

    score_names = ("right",)

    def scores(self, model: CoCa, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        kept = model.objectives["mine"]
        assert not kept.training

        def likeliest(part: Sequence[Record], images: Any) -> Tensor:
            vector, _ = model.pooling(model.image_encoder(images), captioning=False)
            return kept.head(vector)

        words = rows_of(model, records, likeliest).argmax(dim=1).tolist()
        texts = [model.tokenizer.encode(record.captions[0]) for record in records]
        return {"right": sum(word in text for word, text in zip(words, texts, strict=True)) / len(records)}
