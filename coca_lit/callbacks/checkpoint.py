"""Checkpoints between two optimizer steps, when nothing is half done: no step, no accumulation, no validation.

Lightning saves inside its hooks: before the metrics of the step are logged, and at the last batch of an epoch before
validation, which a resumed run then never does. Here a checkpoint is taken when the next batch is about to begin and
the one before is completely done; a resumed run begins with that next batch. Only a signal during a validation does not
wait for its end: the resumed run begins with that validation.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from coca_lit.callbacks.progress import samples_seen
from coca_lit.data.batch import Batch
from coca_lit.distributed import max_over_ranks, print_rank_zero, rank, stable_seed, step_exchange, world_size
from coca_lit.errors import DataError, TrainingError, check_number
from coca_lit.files import atomic_link, remove, try_waiting, write_json
from coca_lit.metrics import lower_is_better
from coca_lit.models import kernels
from coca_lit.reading import read_json
from coca_lit.runs.resume import LAST, RUN_KEY
from coca_lit.runs.run_folder import CHECKPOINTS, inode, step_files
from coca_lit.runs.signals import Signals
from coca_lit.training import lightning_fixes
from coca_lit.training.lightning_fixes import callbacks_of

log = logging.getLogger(__name__)

LIMITS = ("max_epochs", "max_steps")
BEST = "best.ckpt"
BEST_SCORE = "best.json"
EARLIER_BEST = "earlier_best.ckpt"  # by another score, or by one of other images
MAX_FIRST = 0.05  # share of the weights of the first step in an average at the end
TENTH = 10  # the average of about the last tenth of the steps has the decay 1 - 10 / steps


class StepSeeds(L.Callback):
    """Seeds PyTorch's generators of the CPU and the GPUs before every batch by (seed, epoch, batch, rank), so that
    dropout depends on the step and not on what the process did before.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        torch.manual_seed(stable_seed("step", self.seed, trainer.current_epoch, batch_idx, trainer.global_rank))


class Checkpoints(L.Callback):
    """Saves `step_N.ckpt` by steps, by time, after every epoch, at the end and when a signal asks the run to stop.

    `last.ckpt` is a link to the newest, `best.ckpt` to the one with the best score. Must be the first of all callbacks:
    what the others log for a step then comes after the checkpoint before it.

    Args:
        output_dir: the run folder; its folder `checkpoints` is for them.
        every_n_steps: optimizer steps between two checkpoints; None for none.
        every_minutes: minutes between two checkpoints; None for none.
        keep_last: how many are kept, at least 1, in addition to the best.
        best: score by which the best checkpoint is kept, e.g. `mscoco/CIDEr`; None for no such checkpoint. The scores
            compared are those during training, on the first few images (`mscoco_256/CIDEr` in the logs), the last one
            included.
        identity: returns the `coca_lit.runs.resume.identity_of` the run, stored for comparison when it resumes.

    Attributes:
        of: what the score `best` is of, told by who computes it; scores of something else are not compared.
    """

    def __init__(
        self,
        output_dir: str | Path,
        every_n_steps: int | None = None,
        every_minutes: float | None = 15.0,
        keep_last: int = 2,
        best: str | None = None,
        identity: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        if every_n_steps is not None:
            check_number("every_n_steps", every_n_steps, whole=True, at_least=1)
        if every_minutes is not None:
            check_number("every_minutes", every_minutes, above=0)
        check_number("keep_last", keep_last, whole=True, at_least=1)
        self.folder = Path(output_dir) / CHECKPOINTS
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.keep_last = keep_last
        self.best = best
        self.identity = identity
        self.of: dict[str, Any] = {}
        self.signals = Signals()
        self._phase: Literal["training", "validating", "finished"] = "training"
        self._saved: tuple[int, str] | None = None  # step and phase of the last checkpoint
        self._trained = False  # in this process
        self._between_steps = False  # while a checkpoint of ours is written
        self.due_at = math.inf  # by the clock
        self._loaded: dict[str, Any] = {}  # what the checkpoint held that the run resumes from
        self._offered: float | None = None  # the score of the weights at hand, on every rank
        self._unlinked: tuple[int, float | None] | None = None  # step and score of one that may not be written yet
        self._run_folder: int | None = None  # the inode of the folder at the start of the training, if there was one

    # When

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.listen()
        lightning_fixes.leave_sigterm_to_us(trainer)
        step_exchange.start()
        self._phase, self._unlinked, self._offered = "training", None, None  # also where it trains once more
        self._trained = True
        self._run_folder = inode(self.folder.parent)
        self._saved = (trainer.global_step, self._phase)  # there is nothing to save before the first step
        self._set_clock()
        lost = not (self.folder / BEST).exists()  # moved away with the steps that are made again, or one of these
        if rank() == 0 and (lost or self._best_so_far().get("step", 0) > trainer.global_step):
            for name in (BEST, BEST_SCORE):
                (self.folder / name).unlink(missing_ok=True)
        if self._loaded:
            announce(trainer, self._loaded)
            keep_settings(trainer, getattr(pl_module, "configured", ()))
        if self._loaded.get("validating"):
            lightning_fixes.repeat_validation(trainer)
            self._saved = None  # the next checkpoint of this step will know that the validation is over

    def _set_clock(self) -> None:
        self.due_at = math.inf if self.every_minutes is None else time.monotonic() + 60 * self.every_minutes

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._loaded:
            lightning_fixes.set_logged_steps(trainer, self._loaded["logged_steps"])
            self._loaded = {}
        if batch_idx % trainer.accumulate_grad_batches:
            return
        self._link()
        # One decision for all ranks. That of a score is about the weights at hand: it cannot come a step later.
        at_once = world_size() == 1 or self._offered is not None
        stop, late, better = max_over_ranks(self._flags()) if at_once else step_exchange.heard() or (0, 0, 0)
        if at_once:
            step_exchange.start()  # what is under way is known by now, and would delay all that comes after it
        if stop:
            self.signals.in_time()
        step = trainer.global_step
        by_steps = self.every_n_steps is not None and step > 0 and step % self.every_n_steps == 0
        if stop or late or by_steps or better or batch_idx == 0:
            self._save(trainer, pl_module)
            step_exchange.start()  # who was late is not any more
        self._offered = None
        if stop:
            self._stop(trainer, int(stop))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        step_exchange.tell(self._flags())

    def _flags(self) -> list[int]:
        """What this rank asks for: to stop, to save since it is time, to keep the weights as the best."""
        best = rank() == 0 and self._offered is not None and self._is_best(self._offered)
        return [self.signals.received, int(time.monotonic() >= self.due_at), int(best)]

    def _stop(self, trainer: L.Trainer, number: int) -> None:
        step = trainer.global_step
        self._finish_saving(trainer)
        is_saved = self._saved == (step, self._phase) and self._path(step).exists()  # a full disk may have cost it
        saved = f"saved {self._path(step)}" if is_saved else "nothing was saved"
        print_rank_zero(f"stopping after step {step} on signal {number}: {saved}")
        self.signals.answer(trainer, number)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._phase = "training" if trainer.sanity_checking else "validating"

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._phase != "validating" or not lightning_fixes.can_repeat_validation(trainer):
            return
        (stop,) = max_over_ranks([self.signals.received])
        if stop:
            self.signals.in_time()
            self._save(trainer, pl_module)
            self._stop(trainer, int(stop))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._phase = "training"

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._phase = "finished"
        self.signals.in_time()
        self._save(trainer, pl_module)
        self._finish_saving(trainer)
        self.signals.nothing_to_save = True
        (stop,) = max_over_ranks([self.signals.received])  # since the last step began
        if stop:
            self._stop(trainer, int(stop))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Saves, so that broken data do not cost the steps since the last checkpoint. An error within a step, such as a
        lack of memory, does. On a single process only: several would wait for each other.
        """
        if not isinstance(exception, SystemExit):
            self.signals.release()
        alone = isinstance(exception, Exception) and world_size() == 1
        if alone and trainer.global_step and lightning_fixes.is_between_steps(trainer):
            self._save(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.signals.release()

    # What

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if self._saved == (step, self._phase):
            return
        if rank() == 0 and self._run_folder is not None and inode(self.folder.parent) != self._run_folder:
            raise TrainingError(
                f"the run folder {self.folder.parent} was moved or deleted while the run wrote to it: the run ends; "
                "it can be resumed where its checkpoints are"
            )
        try_waiting()  # a run that resumes from here does not make the rows of earlier steps again
        # Within a validation the module holds the averaged weights; they change places with the trained ones.
        with scored_weights(trainer, pl_module) if self._phase == "validating" else nullcontext():
            self._between_steps = True
            try:
                trainer.save_checkpoint(self._path(step))
            finally:
                self._between_steps = False
        self._saved = (step, self._phase)
        self._set_clock()
        self._link()  # the one before, which is written now
        self._unlinked = (step, self._offered)
        self._link()

    def _link(self) -> None:
        """Gives the last checkpoint its names once it exists: a sharded one is written in the background, and a
        full disk costs it. Removes all but the newest checkpoints and the best one.
        """
        if rank() != 0 or self._unlinked is None or not self._path(self._unlinked[0]).exists():
            return
        (step, score), self._unlinked = self._unlinked, None
        try:
            atomic_link(self.folder / LAST, self._path(step))
        except DataError as error:  # a resumed run looks at the files, and links again
            log.warning("%s; training continues", error)
        if score is not None and self._is_best(score):
            try:
                if not self._best_so_far() and (self.folder / BEST).exists():  # by a score that does not compare
                    os.replace(self.folder / BEST, self.folder / EARLIER_BEST)
                atomic_link(self.folder / BEST, self._path(step))
                content = {"score": self.best, "value": score, "step": step, "of": self.of}
                write_json(self.folder / BEST_SCORE, content)
            except (DataError, OSError) as error:
                log.warning("%s; training continues without this best checkpoint", error)
        # The best stays, also where the score that chose it is another one by now, or where it is a copy and no link.
        kept = {(self.folder / name).resolve() for name in (BEST, EARLIER_BEST)}
        kept.add(self._path(self._best_so_far().get("step", -1)).resolve())
        for path in step_files(self.folder)[self.keep_last :]:
            if path.resolve() not in kept:
                with suppress(OSError):  # it goes next time
                    remove(path)

    def _finish_saving(self, trainer: L.Trainer) -> None:
        saving = getattr(trainer.strategy, "saving", None)
        if saving is not None:  # of `FullySharded`
            saving.finish()
        self._link()

    def check_saved(self, trainer: L.Trainer) -> None:
        """Raises `TrainingError` if a full disk has cost the checkpoint at the end of a training."""
        path = self._path(trainer.global_step)
        if self._trained and not path.exists():
            raise TrainingError(
                f"the trained weights are not on disk: {path} could not be saved; make room and start the same command "
                "again, which trains on from the newest checkpoint there"
            )

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}.ckpt"

    # The best

    def offer(self, trainer: L.Trainer, value: float, final: bool = False) -> None:
        """The score `best` of the weights at hand, on every rank. If it is better than any before, their checkpoint is
        the best one.

        Args:
            final: training is over, and the checkpoint of these weights is written.
        """
        if final:
            compared = self._trained or self._best_so_far() or not (self.folder / BEST).exists()
            self._unlinked = (trainer.global_step, value if compared else None)
            self._link()
        else:
            self._offered = value  # rank 0 decides, and tells all others before the next step

    def _is_best(self, value: float) -> bool:
        assert self.best is not None
        before = self._best_so_far().get("value", math.nan)
        better = value < before if lower_is_better(self.best) else value > before
        return not math.isnan(value) and (better or math.isnan(before))

    def _best_so_far(self) -> dict[str, Any]:
        """{"score", "value", "step"} of the best checkpoint by this score; nothing if there is none."""
        if self.best is None or not (self.folder / BEST).exists():
            return {}
        try:
            content = read_json(self.folder / BEST_SCORE, dict)
            score = str(content["score"])
            value = float(content["value"])
            step = int(content["step"])
        except (DataError, ValueError, KeyError, TypeError, OverflowError):  # whatever a crash has left there
            return {}
        known = score == self.best and content.get("of") == self.of and self._path(step).exists()
        return {"score": score, "value": value, "step": step} if known else {}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        validating = self._phase == "validating"
        finished = self._phase == "finished"
        checkpoint[RUN_KEY] = {
            "config": self.identity(),
            "step": trainer.global_step,
            "logged_steps": lightning_fixes.logged_steps(trainer) + validating,
            **_limits(trainer),
            "processes": world_size(),
            "workers": _workers(trainer),
            "fp32_matmul": kernels.fp32_matmul(),
            "finished": finished,
            "validating": validating,
            **samples_seen(trainer),
        }
        if self._between_steps:  # Lightning knows the position of those that its own callbacks take
            lightning_fixes.set_position(trainer, checkpoint, validating, finished)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get(RUN_KEY, {})
        if self._loaded.get("finished") and all(self._loaded.get(k) == limit for k, limit in _limits(trainer).items()):
            trainer.should_stop = True  # nothing is left to train, also where the run was stopped early
            print_rank_zero("the training is already finished: only scores and report are made again")
        before = self._loaded.get("fp32_matmul")
        if before and before != kernels.fp32_matmul():  # the two libraries round differently
            try:
                kernels.use_fp32_matmul(before)
            except ValueError as error:
                print_rank_zero(f"note: the run multiplied by {before}, which this process does not: {error}")


def announce(trainer: L.Trainer, before: dict[str, Any]) -> None:
    """Says where the run goes on, and what differs from the processes that trained it so far.

    Args:
        before: what `Checkpoints` kept in the checkpoint.
    """
    counts = "".join(f", {before[what]:,} {what} seen" for what in ("samples", "tokens") if what in before)
    print_rank_zero(f"resuming after step {trainer.global_step} in epoch {trainer.current_epoch + 1}{counts}")
    for limit in LIMITS:
        if limit in before and before[limit] != (length := getattr(trainer, limit)):
            print_rank_zero(
                f"note: {limit} was {before[limit]} and is now {length}: from here on the learning rate follows it"
            )
    now = {"processes": world_size(), "workers": _workers(trainer)}
    changed = [f"{before[key]} {key} became {now[key]}" for key in now if before.get(key, now[key]) != now[key]]
    if changed:
        print_rank_zero(f"note: {' and '.join(changed)}: every batch holds the same samples as before")


def keep_settings(trainer: L.Trainer, configured: Sequence[dict[str, Any]]) -> None:
    """Gives the groups of a restored optimizer the settings of this run in place of the checkpoint's, and the learning
    rate that its schedule has at this step; where nothing was changed that changes nothing.

    Args:
        configured: the settings of each group; empty for a module that is not `CoCaLit`, whose groups stay as they
            were. So do the groups of a subclass with its own schedule.
    """
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    if not configured or not schedulers or not isinstance(scheduler := schedulers[0], LambdaLR):
        return
    (optimizer,) = trainer.optimizers
    scheduler.base_lrs = [settings["initial_lr"] for settings in configured]
    for group, settings, factor in zip(optimizer.param_groups, configured, scheduler.lr_lambdas, strict=True):
        group |= settings | {"lr": settings["initial_lr"] * factor(scheduler.last_epoch)}


def _limits(trainer: L.Trainer) -> dict[str, Any]:
    """What ends a training."""
    return {limit: getattr(trainer, limit) for limit in LIMITS} | {"max_time": lightning_fixes.max_time(trainer)}


def _workers(trainer: L.Trainer) -> int:
    return getattr(getattr(trainer, "datamodule", None), "num_workers", 0)


# Averaged weights, which are scored during training in place of the trained ones


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
