"""Averaged weights, which are scored during training in place of the trained ones."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import lightning.pytorch as L
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from coca_lit.errors import check_number
from coca_lit.training.lightning_fixes import callbacks_of


class Averaging(WeightAveraging):
    """An exponential average of the weights, in place of the trained weights in every score, checkpoint and at the
    end.

    Args:
        decay: from 0, for the trained weights themselves, to 1, for the initial ones.

    Raises:
        ValueError: `decay` is no such number.
    """

    def __init__(self, decay: float) -> None:
        check_number("decay", decay, at_least=0, at_most=1)
        # Buffers follow the trained model. The average is `average + (1 - decay) · (weight - average)`, which leaves
        # frozen weights as they are; as `decay · average + (1 - decay) · weight`, Lightning's own, they would drift.
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))

    @contextmanager
    def swapped(self, pl_module: L.LightningModule) -> Iterator[None]:
        """The module holds the average within the block, and its own weights again, bit for bit, after it."""
        self._swap_models(pl_module)
        try:
            yield
        finally:
            self._swap_models(pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A finished run was loaded: with nothing to train, `on_train_end` was not called."""
        self._copy_average_to_current(pl_module)


def scored_weights(trainer: L.Trainer, pl_module: L.LightningModule) -> AbstractContextManager[None]:
    """Within the block the module holds the weights to be scored during training: the average if there is one."""
    averaging = callbacks_of(trainer, Averaging)
    return averaging[0].swapped(pl_module) if averaging else nullcontext()
