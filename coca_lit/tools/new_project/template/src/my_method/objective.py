"""An objective: a loss of what one forward pass has computed of a batch.

Shapes: B images of this rank, E the width of features.
"""

from typing import Any

from torch import Tensor

from coca_lit.data.batch import Batch
from coca_lit.models import CoCa, CoCaOutput
from coca_lit.training.objectives import Objective


class Nearness(Objective):
    """How far the cosine of an image and its caption is below `target`, the mean over the pairs.

    Args:
        weight: factor of the loss.
        target: a pair with this cosine is near enough.
    """

    needs = ("image_features", "text_features")  # of the pass; see coca_lit/ADD_YOUR_OWN.md for all names

    def __init__(self, weight: float = 1.0, target: float = 1.0) -> None:
        super().__init__(nearness=weight)
        self.target = target

    @property
    def config(self) -> dict[str, Any]:
        return {"target": self.target}  # kept in checkpoints, to build it again; the weight is for training alone

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        assert out.image_features is not None
        assert out.text_features is not None
        cosines = (out.image_features * out.text_features).sum(dim=1)  # (B,), both have unit length
        return {"nearness": (self.target - cosines).clamp(min=0).mean()}
