"""How many samples a mixture has given from each of its sources."""

from collections import Counter
from typing import Any

import lightning.pytorch as L

from coca_lit.data.batch import Batch
from coca_lit.distributed import world_size


class SourceCounts(L.Callback):
    """Logs the samples seen of each source, as `samples/NAME`; a resumed run goes on counting.

    Every rank interleaves its sources in the same order, so one rank's counts are those of all.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self.counts: Counter[str] = Counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        for name, count in Counter(batch.sources).items():
            self.counts[name] += count * world_size()
        if self.counts and trainer.global_step % self.every_n_steps == 0:
            pl_module.log_dict({f"samples/{name}": float(count) for name, count in self.counts.items()})

    def state_dict(self) -> dict[str, Any]:
        return dict(self.counts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts = Counter(state_dict)
