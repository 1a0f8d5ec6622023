"""What the LightningModule asks of a further loss."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from coca_lit.data.batch import Batch
from coca_lit.models import CoCa


class AuxiliaryLoss(nn.Module, ABC):
    """A module that is trained together with the network, which it does not hold.

    Args:
        weight: factor of the loss.
    """

    trains: Sequence[str] = ()  # parts of the network that it trains, so that they are not frozen with another loss

    def __init__(self, weight: float) -> None:
        super().__init__()
        if not isinstance(weight, int | float) or isinstance(weight, bool) or weight <= 0:
            raise ValueError(f"the weight of an auxiliary loss must be a number above 0, got {weight!r}")
        self.weight = weight

    @abstractmethod
    def forward(self, net: CoCa, batch: Batch) -> Tensor:
        """The raw loss of this rank, a scalar whose mean over ranks is that of the global batch."""
