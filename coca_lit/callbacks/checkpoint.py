"""Checkpoints between two optimizer steps, when nothing is half done: no step, no accumulation, no validation.

Lightning saves inside its hooks: before the metrics of the step are logged, and at the last batch of an epoch before
validation, which a resumed run then never does. Here a checkpoint is taken when the next batch is about to begin and
all that belongs to the one before is over; whoever goes on from it begins with that next batch.
"""

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from coca_lit.callbacks.preemption import Signals
from coca_lit.callbacks.progress import samples_seen
from coca_lit.checkpoint_io import point_to, step_files
from coca_lit.distributed import max_over_ranks, rank, say, world_size
from coca_lit.fp32 import fp32_products
from coca_lit.resume import LAST, RUN_KEY


class Checkpoints(L.Callback):
    """Saves `step_N.ckpt` by steps, by time, after every epoch, at the end and when a signal asks the run to stop.

    `last.ckpt` is a link to the newest. Must be the first of all callbacks: what the others log for a step then comes
    after the checkpoint before it.

    Args:
        dirpath: folder of the checkpoints.
        every_n_steps: optimizer steps between two checkpoints; None for none.
        every_minutes: minutes between two checkpoints; None for none.
        keep_last: how many are kept; at least 1.

    Attributes:
        config: what `coca_lit.resume.decisive` gives, stored to be compared with when the run goes on.
    """

    def __init__(
        self,
        dirpath: str | Path,
        every_n_steps: int | None = None,
        every_minutes: float | None = 15.0,
        keep_last: int = 2,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_minutes", every_minutes)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, or null for never, got {value}")
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        self.folder = Path(dirpath)
        self.every_n_steps, self.every_minutes, self.keep_last = every_n_steps, every_minutes, keep_last
        self.config: dict[str, Any] = {}
        self.signals = Signals()
        self._saved_step = 0  # nothing to save before the first step
        self._saved_at = 0.0
        self._epoch = -1
        self._finished = False
        self._loaded: dict[str, Any] = {}

    # When

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.listen()
        self._saved_step, self._saved_at, self._epoch = trainer.global_step, time.monotonic(), trainer.current_epoch
        if self._loaded:
            _announce(trainer, self._loaded)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._loaded:  # Lightning counts one step too many when it goes on between two batches
            trainer.fit_loop.epoch_loop._batches_that_stepped = self._loaded["logged_steps"]
            self._loaded = {}
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._between_steps(trainer)

    def _between_steps(self, trainer: L.Trainer) -> None:
        minutes = (time.monotonic() - self._saved_at) / 60
        late = self.every_minutes is not None and minutes >= self.every_minutes
        stop, someone_late = max_over_ranks([self.signals.received, late])  # one decision for all ranks
        step, epoch = trainer.global_step, trainer.current_epoch
        due = self.every_n_steps is not None and step > 0 and step % self.every_n_steps == 0
        if stop or someone_late or due or epoch > self._epoch:
            self._epoch = epoch
            self._save(trainer)
        if stop:
            saved = f"saved {self._path(step)}" if self._saved_step == step and step else "nothing was saved"
            say(f"stopping after step {step} on signal {stop}: {saved}; the same command goes on from there")
            self.signals.answer(trainer, int(stop))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finished = True
        self._saved_step = -1  # also where one was saved before: this one knows that training is over
        self._save(trainer)
        self.signals.nothing_to_save = True

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Broken data or a lack of memory need not cost the steps since the last checkpoint. A single process only: the
        others would wait for each other.
        """
        if not isinstance(exception, SystemExit):
            self.signals.release()
        if (
            isinstance(exception, Exception)
            and world_size() == 1
            and trainer.global_step
            and _nothing_half_done(trainer)
        ):
            self._save(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.signals.release()

    # What

    def _save(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        if step == self._saved_step:
            return
        trainer.save_checkpoint(self._path(step))
        self._saved_step, self._saved_at = step, time.monotonic()
        if rank() == 0 and self._path(step).exists():  # else the disk was full
            point_to(self.folder / LAST, self._path(step))
            for path in step_files(self.folder)[self.keep_last :]:
                path.unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}.ckpt"

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        seen = samples_seen(trainer)
        checkpoint[RUN_KEY] = {
            "config": self.config,
            "step": trainer.global_step,
            "logged_steps": trainer.fit_loop.epoch_loop._batches_that_stepped,
            "processes": world_size(),
            "workers": _workers(trainer),
            "fp32_products": fp32_products(),
            "finished": self._finished,
            **seen,
        }
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if self._finished:  # the next epoch, if there is to be one, begins at its first batch
            progress["current"] = dict.fromkeys(progress["current"], 0)
        for counts in (progress["current"], progress["total"]):
            counts.update(dict.fromkeys(counts, counts["completed"]))  # the batch at hand has not begun
        progress["is_last_batch"] = False

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get(RUN_KEY, {})


def _nothing_half_done(trainer: L.Trainer) -> bool:
    """Whether the weights are those after the last whole batch, and no gradient waits for more batches."""
    loop = trainer.fit_loop.epoch_loop
    batches, steps = loop.batch_progress.state_dict()["current"], loop.automatic_optimization.optim_progress
    stepped = steps.optimizer.step.total.ready == steps.optimizer.step.total.completed
    at_a_step = batches["completed"] % trainer.accumulate_grad_batches == 0
    return batches["processed"] == batches["completed"] and stepped and at_a_step


def _announce(trainer: L.Trainer, before: dict[str, Any]) -> None:
    counts = "".join(f", {before[what]:,} {what} seen" for what in ("samples", "tokens") if what in before)
    say(f"going on after step {trainer.global_step} in epoch {trainer.current_epoch}{counts}")
    now = {"processes": world_size(), "workers": _workers(trainer)}
    elastic = getattr(getattr(trainer, "datamodule", None), "elastic", True)
    changed = [f"{before[key]} {key} became {now[key]}" for key in now if before.get(key, now[key]) != now[key]]
    if changed and not elastic:
        say(f"note: {' and '.join(changed)}: shards are dealt out anew, so this epoch may repeat or miss samples")
    elif changed:
        say(f"note: {' and '.join(changed)}: every batch holds the same samples as before")


def _workers(trainer: L.Trainer) -> int:
    return getattr(getattr(trainer, "datamodule", None), "num_workers", 0)
