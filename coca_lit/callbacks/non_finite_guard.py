"""Bad steps: a gradient that is not finite is not applied, and a spike of the loss is recorded.

Both are written to `bad_steps.jsonl` in the run folder: one line per step with its number, the reason, and the sample
keys of all ranks.
"""

import json
import statistics
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch.distributed.tensor import DTensor

from coca_lit.data.batch import Batch
from coca_lit.distributed import gather_objects, max_over_ranks, mean_over_ranks, print_rank_zero, rank
from coca_lit.errors import TrainingError
from coca_lit.files import Waiting, append_lines
from coca_lit.runs.logs import BAD_STEPS

MAD_TO_SIGMA = 1.4826  # of a normal distribution
WARM_UP = 20  # losses; the spread of fewer is unreliable


class NonFiniteGuard(L.Callback):
    """Skips and counts steps whose gradient is not finite on some rank: weights and moments stay as they are on all.

    Args:
        output_dir: the run folder.
        max_in_a_row: the run ends after this many skipped steps in a row.
        spike: a loss is a spike if it is this many robust standard deviations above the median of the last ones; 0 for
            no detection.
        window: how many of the last losses count.
    """

    def __init__(self, output_dir: str | Path, max_in_a_row: int = 10, spike: float = 10.0, window: int = 100) -> None:
        if max_in_a_row < 1:
            raise ValueError(f"max_in_a_row must be at least 1, got {max_in_a_row}")
        if window < WARM_UP:
            raise ValueError(f"window must be at least {WARM_UP}, got {window}")
        self.path = Path(output_dir) / BAD_STEPS
        self._waiting: Waiting[str] = Waiting(self.path, partial(append_lines, self.path))
        self.max_in_a_row, self.spike = max_in_a_row, spike
        self.skipped = self.in_a_row = self.spikes = 0
        self._losses: deque[float] = deque(maxlen=window)
        self._keys: list[str] = []  # of the batches since the last optimizer step
        self._step = 0
        self._statistics: list[tuple[torch.Tensor, torch.Tensor]] = []  # of batch norms: (buffer, its value before)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._keys = []
            norms = [m for m in pl_module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
            self._statistics = [(b, b.clone()) for norm in norms for b in norm.buffers()]
        self._keys += batch.keys
        self._step = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Between backward and the step; without gradients the optimizer touches nothing."""
        if trainer.precision == "16-mixed":
            return  # the loss scaler adapts its scale by such steps, and skips them itself
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not any(max_over_ranks([not _finite(gradients)])):
            self.in_a_row = 0
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        for buffer, before in self._statistics:
            buffer.copy_(before)  # the forward pass has updated it already
        self.skipped += 1
        self.in_a_row += 1
        self._write("gradient not finite", {})
        print_rank_zero(
            f"skipped step {self._step}: its gradient is not finite ({self.skipped} skipped; samples in {self.path})"
        )
        if self.in_a_row >= self.max_in_a_row:
            raise TrainingError(
                f"the gradients of {self.in_a_row} steps in a row, {self._step - self.in_a_row + 1} to {self._step}, "
                "were not finite; nothing was applied, and their samples are in "
                f"{self.path}: try a lower learning rate, fp32 (trainer.precision=32-true), or look at those samples"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not self.spike or not isinstance(outputs, dict) or "loss" not in outputs:
            return
        loss = mean_over_ranks(outputs["loss"].detach()).item() * trainer.accumulate_grad_batches
        if loss != loss or abs(loss) == float("inf"):
            return
        if self._is_spike(loss):
            self.spikes += 1
            median = statistics.median(self._losses)
            self._write("loss spike", {"loss": loss, "median": median}, batch.keys)
            print_rank_zero(
                f"loss spike at step {self._step}: {loss:.4g}, median {median:.4g} (samples in {self.path})"
            )
        if self.spikes:  # in every row, since few spikes fall on a logged step
            pl_module.log("loss_spikes", float(self.spikes))
        self._losses.append(loss)

    def _is_spike(self, loss: float) -> bool:
        if len(self._losses) < WARM_UP:
            return False
        median = statistics.median(self._losses)
        sigma = MAD_TO_SIGMA * statistics.median(abs(x - median) for x in self._losses)
        return loss > median + self.spike * max(sigma, 0.01 * abs(median))  # a constant loss has no spread

    def _write(self, reason: str, numbers: dict[str, float], keys: list[str] | None = None) -> None:
        parts = gather_objects(self._keys if keys is None else keys)
        if rank() == 0:
            everything = [key for part in parts for key in part]
            row = {"step": self._step, "reason": reason, **numbers, "keys": everything}
            self._waiting.add(json.dumps(row))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._waiting.flush()

    def state_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("skipped", "in_a_row", "spikes")}
        return {**counts, "losses": list(self._losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row, self.spikes = (state_dict[k] for k in ("skipped", "in_a_row", "spikes"))
        self._losses.extend(state_dict["losses"])


def _finite(gradients: list[torch.Tensor]) -> bool:
    """Whether all numbers (of this rank's part) are finite, with one synchronisation with the device."""
    own = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    if not (own := [gradient for gradient in own if gradient.numel()]):
        return True
    norms = torch._foreach_norm(own, float("inf"))
    return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())
