"""The loss term of distillation, from teachers whose embeddings are stored with the samples."""

from torch import Tensor

from coca_lit.data.batch import Batch
from coca_lit.errors import ConfigError
from coca_lit.models import CoCa, CoCaOutput
from coca_lit.projects.distillation.loss import distillation_loss
from coca_lit.projects.distillation.reinforced import teachers_of
from coca_lit.training.objectives import Objective


class Distillation(Objective):
    """The student's similarities follow its teachers', see `distillation_loss`. It takes part of the weight of the
    contrastive loss: MobileCLIP's (1 - λ) · contrastive + λ · distillation is `contrastive_weight=1-λ` and
    `objectives.NAME.weight=λ`. Batches of a validation without teachers have no such term.

    Args:
        weight: factor of the loss.
    """

    needs = ("image_features", "text_features", "logit_scale")
    is_counted = False  # it adds less than the contrastive loss

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(distillation=weight)

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        teachers = teachers_of(batch)
        if not teachers:
            if self.training:
                raise ConfigError(
                    "distillation needs the embeddings of teachers: set data.teachers, see coca-data teach"
                )
            return {}
        assert out.image_features is not None
        assert out.text_features is not None
        loss = distillation_loss(out.image_features, out.text_features, out.logit_scale, teachers)
        return {"distillation": loss}
