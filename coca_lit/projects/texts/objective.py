"""What batches of texts alone are trained for."""

from torch import Tensor

from coca_lit.data.batch import Batch
from coca_lit.errors import ConfigError
from coca_lit.models import CoCa
from coca_lit.training.objectives import Objective, caption_term


class TextLoss(Objective):
    """The caption loss of texts without images, for which the decoder is a language model.

    Args:
        weight: 0 trains nothing, and the decoder is frozen if no other loss trains it.
        label_smoothing: the share of every target that is spread over the vocabulary, in training.
    """

    trains = ("decoder",)
    works_with_micro_batches = True  # texts are not split
    works_sharded = True
    averages_tokens = True
    reads_captions = False
    config_key = "data.text"

    def __init__(self, weight: float, label_smoothing: float = 0.0) -> None:
        super().__init__(text=weight)
        self.label_smoothing = label_smoothing

    def build(self, net: CoCa) -> None:
        if net.decoder is None:
            raise ConfigError(
                "data.text does not work with model.net.decoder_layers=0: texts train the decoder, so give the model "
                "one or set data.text=null"
            )

    def takes(self, batch: Batch) -> bool:
        return len(batch.images) == 0

    def trained_parts(self, net: CoCa) -> list[str]:
        return super().trained_parts(net) if self.weights["text"] else []

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        out = net.captions_of(None, batch.tokens, batch.lengths)
        return {"text": caption_term(out, self.label_smoothing if self.training else 0.0)}
