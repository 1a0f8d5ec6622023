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
from coca_lit.distributed import Arriving, gather_objects, print_rank_zero, rank, step_exchange
from coca_lit.errors import TrainingError, check_number
from coca_lit.files import Waiting, append_lines
from coca_lit.runs.logs import BAD_STEPS

MAD_TO_SIGMA = 1.4826  # of a normal distribution
WARM_UP = 20  # losses; the spread of fewer is unreliable


class _Measured(NamedTuple):
    """What the device knows of a step."""

    step: int
    keys: list[str]
    numbers: Arriving  # 1 if its gradient is not finite on some rank, else 0; its loss


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
        check_number("max_in_a_row", max_in_a_row, whole=True, at_least=1)
        check_number("window", window, whole=True, at_least=WARM_UP)
        self.path = Path(output_dir) / BAD_STEPS
        self._waiting: Waiting[str] = Waiting(self.path, partial(append_lines, self.path))
        self.max_in_a_row, self.spike = max_in_a_row, spike
        self.skipped = self.in_a_row = self.spikes = 0
        self._losses: deque[float] = deque(maxlen=window)
        self._keys: list[str] = []  # of the batches since the last optimizer step
        self._step = self._last_skipped = 0
        self._statistics: list[tuple[torch.Tensor, torch.Tensor]] = []  # of batch norms: (buffer, its value before)
        self._loss: torch.Tensor | None = None  # of this rank, since the last optimizer step
        self._measured: _Measured | None = None  # not judged yet

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._keys, self._loss = [], None
            norms = [m for m in pl_module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
            self._statistics = [(b, b.clone()) for norm in norms for b in norm.buffers()]
        self._keys += batch.keys
        self._step = trainer.global_step

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        loss = loss.detach().float()
        if trainer.precision == "16-mixed":
            loss = loss / trainer.precision_plugin.scaler.scale(torch.ones_like(loss))  # type: ignore[attr-defined]
        self._loss = loss if self._loss is None else self._loss + loss  # each is a share of accumulated ones

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Between backward and the step; without gradients the optimizer touches nothing."""
        self._judge()  # the step before
        if self._loss is None:
            return
        scaled = trainer.precision == "16-mixed"  # whose scaler adapts by such steps, and skips them itself
        gradients = [] if scaled else [p.grad for group in optimizer.param_groups for p in group["params"]]
        own = torch.stack([_not_finite(gradients, self._loss), self._loss])
        everywhere = step_exchange.exchange(own)  # (W, 2)
        bad = everywhere[:, 0].amax()
        numbers = Arriving(torch.stack([bad, everywhere[:, 1].mean()]))
        self._measured = _Measured(self._step, self._keys, numbers)
        if scaled:
            return
        if bad.is_cuda and getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = bad  # type: ignore[attr-defined]  # as the loss scaler of fp16 tells it
            for buffer, before in self._statistics:  # the forward pass has updated it already
                buffer.copy_(torch.where(bad > 0, before, buffer))
        elif self._judge():
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

    def _judge(self) -> bool:
        """Counts the last step if its gradient was not finite, and returns whether that is so; notes its loss."""
        if self._measured is None:
            return False
        (step, keys, numbers), self._measured = self._measured, None
        bad, loss = numbers.read()
        if self.spike:
            self._judge_loss(step, keys, loss)
        if not bad:
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
        if self.spikes and is_logged_step(trainer):  # in every row, since few spikes fall on a logged step
            pl_module.log("loss_spikes", float(self.spikes))

    def _judge_loss(self, step: int, keys: list[str], loss: float) -> None:
        """Notes the loss of a step, and a spike if it was one."""
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
        self._judge()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._waiting.flush()

    def state_dict(self) -> dict[str, Any]:
        self._judge()
        counts = {name: getattr(self, name) for name in ("skipped", "in_a_row", "spikes")}
        return {**counts, "losses": list(self._losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row, self.spikes = (state_dict[k] for k in ("skipped", "in_a_row", "spikes"))
        self._losses.extend(state_dict["losses"])


def _not_finite(gradients: list[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
    """(), 1 if a number is not finite on this rank, else 0; of the type and on the device of `like`."""
    parts = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    own = [gradient for gradient in parts if gradient is not None and gradient.numel()]
    if not own:
        return torch.zeros_like(like)
    norms = torch._foreach_norm(own, float("inf"))
    return (~torch.stack([norm.float() for norm in norms]).isfinite().all()).to(like.dtype)
