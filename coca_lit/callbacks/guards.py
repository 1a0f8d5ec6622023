"""What can go wrong while a run trains, noted in its run folder: steps that are not finite, bad samples. And ranks that
would train different things.
"""

import csv
import json
import logging
import math
import statistics
from collections import Counter, deque
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch.distributed.tensor import DTensor

from coca_lit.data.bad_samples import BadSample
from coca_lit.data.batch import Batch
from coca_lit.data.datamodule import CaptionDataModule
from coca_lit.distributed import Arriving, gather_objects, print_rank_zero, rank, step_exchange, world_size
from coca_lit.errors import DataError, TrainingError, check_number
from coca_lit.files import Waiting, append_lines, atomic_write, csv_line, spreadsheet_text, whole_lines
from coca_lit.runs.run_folder import BAD_STEPS
from coca_lit.training.lightning_fixes import logs_this_step

log = logging.getLogger(__name__)

MAD_TO_SIGMA = 1.4826  # of a normal distribution
WARM_UP = 20  # losses; the spread of fewer is unreliable
BAD_SAMPLES = "bad_samples"
MAX_LINES = 100_000  # per process: a file to read, not a second data set


class NonFiniteGuard(L.Callback):
    """Skips and counts steps whose gradient is not finite on some rank: weights and moments stay as they are on all.
    Notes them, and spikes of the loss, in `bad_steps.jsonl`: a line per step with its number, the reason, and the
    sample keys of all ranks.

    On a GPU the host knows of both one step later: to know at once it would have to wait for the device, which would
    have nothing to do meanwhile. A fused optimizer skips the step by itself. With 16-mixed the scaler
    adapts by such steps and skips them; those whose loss is not finite either are counted and noted.

    Args:
        output_dir: the run folder.
        max_in_a_row: the run ends after this many skipped steps in a row.
        spike: a loss is a spike if it is this many robust standard deviations above the median of the last ones; 0 for
            no detection.
        window: how many of the last losses count, at least 20.
    """

    def __init__(self, output_dir: str | Path, max_in_a_row: int = 10, spike: float = 10.0, window: int = 100) -> None:
        check_number("max_in_a_row", max_in_a_row, whole=True, at_least=1)
        check_number("window", window, whole=True, at_least=WARM_UP)
        check_number("spike", spike, at_least=0)
        self.path = Path(output_dir) / BAD_STEPS
        self._waiting: Waiting[str] = Waiting(self.path, partial(append_lines, self.path))
        self.max_in_a_row = max_in_a_row
        self.spike = spike
        self.skipped = self.in_a_row = self.spikes = 0
        self._losses: deque[float] = deque(maxlen=window)
        self._keys: list[str] = []  # of the batches since the last optimizer step
        self._step = self._last_skipped = 0
        self._statistics: list[tuple[torch.Tensor, torch.Tensor]] = []  # of batch norms: (buffer, its value before)
        self._loss: torch.Tensor | None = None  # of this rank, since the last optimizer step
        # What the device knows of a step that is not judged yet: its number, the keys of its samples, and whether its
        # gradient is not finite on some rank (1 or 0) and its loss.
        self._measured: tuple[int, list[str], Arriving] | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._keys = []
            self._loss = None
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
        """Between backward and the step: finds out whether the gradients of all ranks are finite."""
        self._settle_last_step()  # the step before
        assert self._loss is not None
        scaled = trainer.precision == "16-mixed"
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        not_finite = _not_finite([self._loss] if scaled else gradients, self._loss)
        of_rank = torch.stack([not_finite, self._loss])
        everywhere = step_exchange.exchange(of_rank)  # (W, 2)
        bad = everywhere[:, 0].amax()
        self._measured = self._step, self._keys, Arriving(torch.stack([bad, everywhere[:, 1].mean()]))
        if scaled or (bad.is_cuda and getattr(optimizer, "_step_supports_amp_scaling", False)):
            if not scaled:
                optimizer.found_inf = bad  # type: ignore[attr-defined]  # as the loss scaler of fp16 tells it
            for buffer, before in self._statistics:  # the forward pass has updated it already
                buffer.copy_(torch.where(bad > 0, before, buffer))
        elif self._settle_last_step():
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

    def _settle_last_step(self) -> bool:
        """Reads the numbers of the last step, on all ranks: reports a spike of its loss, and counts it if its gradient
        was not finite, which is returned.
        """
        if self._measured is None:
            return False
        (step, keys, numbers), self._measured = self._measured, None
        bad, loss = numbers.read()
        if self.spike and math.isfinite(loss):
            if len(self._losses) >= WARM_UP:
                median = statistics.median(self._losses)
                sigma = MAD_TO_SIGMA * statistics.median(abs(x - median) for x in self._losses)
                if loss > median + self.spike * max(sigma, 0.01 * abs(median)):  # a constant loss has no spread
                    self.spikes += 1
                    self._write(step, "loss spike", {"loss": loss, "median": median}, keys)
                    said = f"{loss:.4g}, median {median:.4g} (samples in {self.path})"
                    print_rank_zero(f"loss spike at step {step}: {said}")
            self._losses.append(loss)
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
        if self.spikes and logs_this_step(trainer):  # in every row, since few spikes fall on a logged step
            pl_module.log("loss_spikes", float(self.spikes))

    def _write(self, step: int, reason: str, numbers: dict[str, float], keys: list[str]) -> None:
        everything = [key for part in gather_objects(keys) for key in part]
        if rank() == 0:
            self._waiting.add(json.dumps({"step": step, "reason": reason, **numbers, "keys": everything}))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._settle_last_step()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._waiting.flush()

    def state_dict(self) -> dict[str, Any]:
        self._settle_last_step()
        counts = {name: getattr(self, name) for name in ("skipped", "in_a_row", "spikes")}
        return {**counts, "losses": list(self._losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row, self.spikes = (state_dict[k] for k in ("skipped", "in_a_row", "spikes"))
        self._losses.extend(state_dict["losses"])


def _not_finite(gradients: list[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
    """(), 1 if a number is not finite on this rank, else 0; of the type and on the device of `like`."""
    parts = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    judged = [gradient for gradient in parts if gradient is not None and gradient.numel()]
    if not judged:
        return torch.zeros_like(like)
    norms = torch._foreach_norm(judged, float("inf"))
    return (~torch.stack([norm.float() for norm in norms]).isfinite().all()).to(like.dtype)


class BadSampleLog(L.Callback):
    """Appends each bad sample to `bad_samples/rank0.csv` (a file per process) when it is first seen, and counts them by
    shard in `bad_samples/shards.csv` when training ends or fails.

    A sample is listed once, however often it comes up, also by a run that resumes in the same folder.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.folder = Path(output_dir) / BAD_SAMPLES
        self._known: set[BadSample] = set()
        self._waiting: Waiting[str] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._known = read_bad_samples(self.folder)
        path = self.folder / f"rank{rank()}.csv"
        self._waiting = Waiting(path, partial(append_lines, path))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        listed = [BadSample(*map(spreadsheet_text, found)) for found in batch.bad]
        new = [found for found in dict.fromkeys(listed) if found not in self._known]
        if new and len(self._known) < MAX_LINES:
            self._known.update(new)
            assert self._waiting is not None
            self._waiting.add(*map(csv_line, new))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._waiting is not None:
            self._waiting.flush()
        if rank() != 0 or not (found := read_bad_samples(self.folder)):
            return
        counts = Counter((sample.shard, sample.reason) for sample in found)
        rows = [(shard, reason, count) for (shard, reason), count in sorted(counts.items())]
        lines = map(csv_line, [("shard", "reason", "samples"), *rows])
        try:
            atomic_write(self.folder / "shards.csv", "".join(f"{line}\n" for line in lines).encode())
        except DataError as error:
            log.warning("%s", error)
        shards = len({sample.shard for sample in found})
        log.warning("left out %d bad samples of %d shards, listed in %s", len(found), shards, self.folder)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)


def read_bad_samples(folder: Path) -> set[BadSample]:
    """What all processes have listed in the folder; a line that a crash cut off is ignored."""
    found: set[BadSample] = set()
    for path in folder.glob("rank*.csv"):
        for line in whole_lines(path):
            with suppress(csv.Error):  # a damaged line
                row = next(csv.reader([line]), [])
                if len(row) == len(BadSample._fields):
                    found.add(BadSample(*row))
    return found


class SameOnAllRanks(L.Callback):
    """Refuses to train where processes are about to do different things: each has found its data, and the checkpoint
    to resume from, by itself, perhaps on another machine, and in a sweep its job.

    Args:
        output_dir: the run folder, whose name must be the same.
        resumes: whether this process resumes from a checkpoint.
    """

    def __init__(self, output_dir: str | Path, resumes: bool) -> None:
        self.name = Path(output_dir).name
        self.resumes = resumes

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if world_size() == 1:
            return
        of_rank: dict[str, Any] = {"run": self.name, "whether it resumes (is the run folder shared?)": self.resumes}
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, CaptionDataModule):
            of_rank |= {"steps an epoch": data.steps_per_epoch, "data": data.state_dict()}
        _compare(of_rank)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _compare({"steps already trained": trainer.global_step})  # of what was loaded, after the first one's choice


def _compare(of_rank: dict[str, Any]) -> None:
    """Raises `DataError` on every process if any has another value than the first."""
    first, *others = gather_objects(of_rank)
    for process, other in enumerate(others, start=1):
        for name, value in first.items():
            if other[name] != value:
                raise DataError(f"process {process} differs from the first in {name}: {other[name]}, not {value}")
