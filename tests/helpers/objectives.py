"""Objectives: one that is kept with the model, one with a pass of its own, and one that draws numbers."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.data.batch import Batch
from coca_lit.data.records import Record
from coca_lit.errors import ConfigError
from coca_lit.evals import Evaluation, Settings
from coca_lit.evals.inference import rows_of
from coca_lit.losses import contrastive_term
from coca_lit.models import CoCa, CoCaOutput, create_model, register_objective
from coca_lit.models.coca import CAPTION
from coca_lit.training.objectives import Objective, caption_term, terms_of


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


class DrawnTargets(Objective):
    """In the place of the caption loss: the decoder's states come near to numbers that are drawn at every step. It
    reads all captions first, and works with the whole network alone.
    """

    needs = CAPTION
    replaces = ("caption",)
    works_with_micro_batches = False
    works_sharded = False
    is_counted = False

    def __init__(self) -> None:
        super().__init__(drawn=1.0)

    def take_data(self, data: Any) -> None:
        if not hasattr(data, "training_captions"):
            raise ConfigError(f"{self.config_key} needs all captions, and {type(data).__name__} does not list them")
        self.captions = data.training_captions()

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        assert set(batch.keys) <= self.captions.keys()
        target = torch.randn(out.hidden.shape[1])
        self.measures = {"target": target.sum().item()}
        return {"drawn": (out.hidden - target.to(out.hidden.device)).square().mean()}


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


class FurtherTexts(Objective):
    """The contrastive loss of each image and the mean of its further captions."""

    needs = ("image_features", "further_text_features", "logit_scale")

    def __init__(self) -> None:
        super().__init__(further=1.0)

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        texts = F.normalize(out.further_text_features.mean(dim=1), dim=-1)
        return {"further": contrastive_term(out.image_features, texts, out.logit_scale, None)}


class OwnCaptions(Objective):
    """The caption loss, by a pass of its own."""

    averages_tokens = True

    def __init__(self) -> None:
        super().__init__(own_captions=1.0)

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        return {"own_captions": caption_term(net(batch.images, batch.tokens, batch.lengths, needs=CAPTION))}


def check_means(objective: Objective, term: str, over_tokens: bool) -> None:
    """Checks that an objective knows whether the mean of two batches is not that of the whole, on captions of 5 and of
    16 tokens.
    """
    torch.manual_seed(0)
    net = create_model("coca_tiny").eval()
    lengths = torch.tensor([5, 16])
    tokens = torch.randint(4, net.tokenizer.vocab_size, (2, 16))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    whole = Batch(images, tokens, lengths, ["", ""])
    parts = [Batch(images[i : i + 1], tokens[i : i + 1, :n], lengths[i : i + 1], [""]) for i, n in enumerate((5, 16))]
    objective.build(net)
    with torch.no_grad():
        together = terms_of(net, [objective], whole).values[term]
        apart = [terms_of(net, [objective], part).values[term] for part in parts]
    equal = together.item() == pytest.approx(torch.stack(apart).mean().item(), rel=1e-4)
    assert objective.averages_tokens == over_tokens == (not equal)
