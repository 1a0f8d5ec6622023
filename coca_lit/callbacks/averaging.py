"""Averaged weights, which are scored during training in place of the trained ones."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as L
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from coca_lit.distributed import print_rank_zero
from coca_lit.errors import check_number
from coca_lit.training.lightning_fixes import callbacks_of

MAX_FIRST = 0.05  # share of the weights of the first step in an average at the end
TENTH = 10  # the average of about the last tenth of the steps has the decay 1 - 10 / steps


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
        self.decay = decay
        # Buffers follow the trained model. The average is `average + (1 - decay) · (weight - average)`, which leaves
        # frozen weights as they are; as `decay · average + (1 - decay) · weight`, Lightning's own, they would drift.
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says where the average will hardly be of trained weights."""
        steps = trainer.estimated_stepping_batches
        if math.isfinite(steps) and steps > TENTH and (share := self.decay ** (steps - 1)) > MAX_FIRST:
            print_rank_zero(
                f"note: {100 * share:.0f} % of the averaged weights, which are scored and saved, are of the first of "
                f"{steps:,} steps: set ema={1 - TENTH / steps:.6g}, or ema=null for the trained weights"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A finished run was loaded: with nothing to train, `on_train_end` was not called."""
        self._copy_average_to_current(pl_module)


@contextmanager
def scored_weights(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """Within the block the module holds the weights to be scored during training: the average if there is one. After it
    the module holds its own weights again, bit for bit.
    """
    averaging = callbacks_of(trainer, Averaging)
    for average in averaging:
        average._swap_models(pl_module)
    try:
        yield
    finally:
        for average in averaging:
            average._swap_models(pl_module)
