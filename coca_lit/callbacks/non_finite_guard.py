"""Bad steps: a gradient that is not finite is not applied, and a spike of the loss is recorded.

Both are written to `bad_steps.jsonl` in the run folder: one line per step with its number, the reason, and the sample
keys of all ranks.

On a GPU the host knows of both one step later: to know at once it would have to wait for the device, which would have
nothing to do meanwhile. A fused optimizer skips the step by itself.
"""

import json
import statistics
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from torch.distributed.tensor import DTensor

from coca_lit.callbacks.resuming import is_logged_step
from coca_lit.data.batch import Batch
from coca_lit.distributed import Arriving, gather_objects, highest_over_ranks, mean_over_ranks, print_rank_zero, rank
from coca_lit.errors import TrainingError
from coca_lit.files import Waiting, append_lines
from coca_lit.runs.logs import BAD_STEPS

MAD_TO_SIGMA = 1.4826  # of a normal distribution
WARM_UP = 20  # losses; the spread of fewer is unreliable


class _Measured(NamedTuple):
    """A number of a step."""

    step: int
    keys: list[str]
    number: Arriving


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
        self._step = self._last_skipped = 0
        self._statistics: list[tuple[torch.Tensor, torch.Tensor]] = []  # of batch norms: (buffer, its value before)
        self._gradient: _Measured | None = None  # not judged yet: 1 if it is not finite
        self._loss: _Measured | None = None

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
        self._judge_gradient()  # of the step before
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        bad = _not_finite(gradients)
        self._gradient = _Measured(self._step, self._keys, Arriving(bad))
        if bad.is_cuda and getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = bad  # type: ignore[attr-defined]  # as the loss scaler of fp16 tells it
            for buffer, before in self._statistics:  # the forward pass has updated it already
                buffer.copy_(torch.where(bad > 0, before, buffer))
        elif self._judge_gradient():
            for buffer, before in self._statistics:
                buffer.copy_(before)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # without gradients the optimizer touches nothing
        if self.in_a_row >= self.max_in_a_row:
            raise TrainingError(
                f"the gradients of {self.in_a_row} steps in a row, {self._last_skipped - self.in_a_row + 1} to "
                f"{self._last_skipped}, were not finite; nothing was applied, and their samples are in "
                f"{self.path}: try a lower learning rate, fp32 (trainer.precision=32-true), or look at those samples"
            )

    def _judge_gradient(self) -> bool:
        """Counts the last step if its gradient was not finite, and returns whether that is so."""
        if self._gradient is None:
            return False
        (step, keys, bad), self._gradient = self._gradient, None
        if not any(bad.read()):
            self.in_a_row = 0
            return False
        self.skipped += 1
        self.in_a_row += 1
        self._last_skipped = step
        self._write(step, "gradient not finite", {}, keys)
        print_rank_zero(
            f"skipped step {step}: its gradient is not finite ({self.skipped} skipped; samples in {self.path})"
        )
        return True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not self.spike or not isinstance(outputs, dict) or "loss" not in outputs:
            return
        self._judge_loss()  # of the step before
        loss = mean_over_ranks(outputs["loss"].detach()) * trainer.accumulate_grad_batches
        self._loss = _Measured(self._step, batch.keys, Arriving(loss))
        if not loss.is_cuda:
            self._judge_loss()
        if self.spikes and is_logged_step(trainer):  # in every row, since few spikes fall on a logged step
            pl_module.log("loss_spikes", float(self.spikes))

    def _judge_loss(self) -> None:
        """Notes the last loss, and a spike if it was one."""
        if self._loss is None:
            return
        (step, keys, found), self._loss = self._loss, None
        (loss,) = found.read()
        if loss != loss or abs(loss) == float("inf"):
            return
        if self._is_spike(loss):
            self.spikes += 1
            median = statistics.median(self._losses)
            self._write(step, "loss spike", {"loss": loss, "median": median}, keys)
            print_rank_zero(f"loss spike at step {step}: {loss:.4g}, median {median:.4g} (samples in {self.path})")
        self._losses.append(loss)

    def _is_spike(self, loss: float) -> bool:
        if len(self._losses) < WARM_UP:
            return False
        median = statistics.median(self._losses)
        sigma = MAD_TO_SIGMA * statistics.median(abs(x - median) for x in self._losses)
        return loss > median + self.spike * max(sigma, 0.01 * abs(median))  # a constant loss has no spread

    def _write(self, step: int, reason: str, numbers: dict[str, float], keys: list[str]) -> None:
        parts = gather_objects(keys)
        if rank() == 0:
            everything = [key for part in parts for key in part]
            row = {"step": step, "reason": reason, **numbers, "keys": everything}
            self._waiting.add(json.dumps(row))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._judge_gradient()
        self._judge_loss()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._waiting.flush()

    def state_dict(self) -> dict[str, Any]:
        self._judge_gradient()
        self._judge_loss()
        counts = {name: getattr(self, name) for name in ("skipped", "in_a_row", "spikes")}
        return {**counts, "losses": list(self._losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row, self.spikes = (state_dict[k] for k in ("skipped", "in_a_row", "spikes"))
        self._losses.extend(state_dict["losses"])


def _not_finite(gradients: list[torch.Tensor]) -> torch.Tensor:
    """(), 1 if a number is not finite on some rank, else 0; on the device of the gradients."""
    own = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    bad = own[0].new_zeros((), dtype=torch.float32)
    if own := [gradient for gradient in own if gradient.numel()]:
        norms = torch._foreach_norm(own, float("inf"))
        bad = (~torch.stack([norm.float() for norm in norms]).isfinite().all()).float()
    return highest_over_ranks(bad)
