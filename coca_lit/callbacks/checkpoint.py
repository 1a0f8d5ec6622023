"""Checkpoints between two optimizer steps, when nothing is half done: no step, no accumulation, no validation.

Lightning saves inside its hooks: before the metrics of the step are logged, and at the last batch of an epoch before
validation, which a resumed run then never does. Here a checkpoint is taken when the next batch is about to begin and
the one before is completely done; a resumed run begins with that next batch. Only a signal during a validation does not
wait for its end: the resumed run begins with that validation.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning.pytorch as L
import torch

from coca_lit.callbacks.averaging import scored_weights
from coca_lit.callbacks.best import BEST, EARLIER_BEST, BestCheckpoint
from coca_lit.callbacks.progress import samples_seen
from coca_lit.callbacks.resumed import announce, apply_settings, limits, workers
from coca_lit.data.batch import Batch
from coca_lit.distributed import max_over_ranks, print_rank_zero, rank, stable_seed, step_exchange, world_size
from coca_lit.errors import DataError, TrainingError, check_number
from coca_lit.files import atomic_link, remove, retry_waiting_rows
from coca_lit.models import kernels
from coca_lit.runs.resume import LAST, RUN_KEY
from coca_lit.runs.run_folder import CHECKPOINTS, ENVIRONMENT, seconds_so_far, step_files
from coca_lit.runs.signals import Signals
from coca_lit.training import lightning_fixes

log = logging.getLogger(__name__)

Phase = Literal["training", "validating", "finished"]


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


class Unlinked(NamedTuple):
    """A checkpoint whose links are not set, since it may not be written yet.

    Attributes:
        score: of its weights, if `best` was computed.
    """

    step: int
    score: float | None


@dataclass
class TrainingState:
    """What `Checkpoints` knows of the training under way.

    Attributes:
        phase: what the trainer does.
        saved: step and phase of the last checkpoint.
        unlinked: the last checkpoint, until it has its links.
        score: the score `best` of the weights at hand, on every rank; None where it was not computed.
        due_at: when the next checkpoint is due, by the monotonic clock.
        is_described: whether the run folder has its `environment.json`, as far as was seen.
    """

    phase: Phase = "training"
    saved: tuple[int, Phase] | None = None
    unlinked: Unlinked | None = None
    score: float | None = None
    due_at: float = math.inf
    is_described: bool = False


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
        best: keeps the best checkpoint; None where none is asked for.
        state: of the training under way.
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
        self.best = BestCheckpoint(self.folder, best) if best is not None else None
        self.identity = identity
        self.signals = Signals()
        self.state = TrainingState()
        self._trained = False  # in this process
        self._saving = False  # while a checkpoint of ours is written
        self._resumed: dict[str, Any] = {}  # what `on_save_checkpoint` kept in the checkpoint that the run resumes from

    # When

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.listen()
        lightning_fixes.leave_sigterm_to_us(trainer)
        step_exchange.reset()
        step = trainer.global_step
        self.state = TrainingState()  # also where it trains once more
        self.state.saved = (step, "training")  # there is nothing to save before the first step
        self.state.is_described = (self.folder.parent / ENVIRONMENT).exists()
        self._trained = True
        self._set_clock()
        if self.best is not None and rank() == 0:
            self.best.forget_after(step)
        if self._resumed:
            announce(trainer, self._resumed)
            apply_settings(trainer, getattr(pl_module, "optimizer_settings", ()))
        if self._resumed.get("validating"):
            lightning_fixes.repeat_validation(trainer)
            self.state.saved = None  # the next checkpoint of this step will know that the validation is over

    def _set_clock(self) -> None:
        if self.every_minutes is not None:
            self.state.due_at = time.monotonic() + 60 * self.every_minutes

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._resumed:
            lightning_fixes.set_logged_steps(trainer, self._resumed["logged_steps"])
            self._resumed = {}
        if batch_idx % trainer.accumulate_grad_batches:
            return
        self._link()
        # One decision for all ranks. That of a score is about the weights at hand: it cannot come a step later.
        at_once = world_size() == 1 or self.state.score is not None
        if at_once:
            stop, due, better = max_over_ranks(self._flags())
            step_exchange.reset()  # this decision includes the numbers that are under way
        else:
            stop, due, better = step_exchange.heard() or (0, 0, 0)
        if stop:
            self.signals.cancel_requeue()
        step = trainer.global_step
        by_steps = self.every_n_steps is not None and step > 0 and step % self.every_n_steps == 0
        if stop or due or by_steps or better or batch_idx == 0:  # the last: after every epoch
            self._save(trainer, pl_module)
            step_exchange.reset()  # flags from before this checkpoint would ask for another one
        self.state.score = None
        if stop:
            self._stop(trainer, int(stop))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        step_exchange.tell(self._flags())

    def _flags(self) -> list[int]:
        """What this rank asks for: to stop, to save since it is time, to keep the weights as the best."""
        due = time.monotonic() >= self.state.due_at
        return [self.signals.received, int(due), int(rank() == 0 and self._is_best(self.state.score))]

    def _stop(self, trainer: L.Trainer, number: int) -> None:
        step = trainer.global_step
        self._finish_saving(trainer)
        is_on_disk = self._is_saved(step) and self._path(step).exists()  # a full disk may have cost it
        saved = f"saved {self._path(step)}" if is_on_disk else "nothing was saved"
        print_rank_zero(f"stopping after step {step} on signal {number}: {saved}")
        self.signals.answer(trainer, number)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.state.phase = "training" if trainer.sanity_checking else "validating"

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.state.phase != "validating" or not lightning_fixes.can_repeat_validation(trainer):
            return
        (stop,) = max_over_ranks([self.signals.received])
        if stop:
            self.signals.cancel_requeue()
            self._save(trainer, pl_module)
            self._stop(trainer, int(stop))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.state.phase = "training"

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.state.phase = "finished"
        self.signals.cancel_requeue()
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
        if self._is_saved(step):
            return
        retry_waiting_rows()  # a run that resumes from here does not make the rows of earlier steps again
        self._notice_moved()
        # Within a validation Lightning has put the averaged weights into the module: exchanged once more, the trained
        # ones are saved, with the average beside them.
        with scored_weights(trainer, pl_module) if self.state.phase == "validating" else nullcontext():
            self._saving = True
            try:
                trainer.save_checkpoint(self._path(step))
            finally:
                self._saving = False
        self.state.saved = (step, self.state.phase)
        self._set_clock()
        self._link()  # the one before, which is written now
        self.state.unlinked = Unlinked(step, self.state.score)
        self._link()

    def _notice_moved(self) -> None:
        """Says once that the run folder was moved or deleted. The run goes on, since its checkpoints are whole."""
        if self.state.is_described and not (self.folder.parent / ENVIRONMENT).exists():
            self.state.is_described = False
            if rank() == 0:
                log.warning(
                    "%s was moved or deleted: the run goes on writing there, and what it wrote before is not with it",
                    self.folder.parent,
                )

    def _is_saved(self, step: int) -> bool:
        return self.state.saved == (step, self.state.phase)

    def _link(self) -> None:
        """Gives the last checkpoint its names once it exists: a sharded one is written in the background, and a
        full disk costs it. Removes all but the newest checkpoints and the best one.
        """
        unlinked = self.state.unlinked
        if rank() != 0 or unlinked is None or not self._path(unlinked.step).exists():
            return
        self.state.unlinked = None
        path = self._path(unlinked.step)
        try:
            atomic_link(self.folder / LAST, path)
        except DataError as error:  # a resumed run looks at the files, and links again
            log.warning("%s; training continues", error)
        if self.best is not None and unlinked.score is not None:
            self.best.keep_if_better(path, unlinked.step, unlinked.score)
        self._remove_old()

    def _remove_old(self) -> None:
        # The best stays, also where the score that chose it is another one by now, or where it is a copy and no link.
        kept = {(self.folder / name).resolve() for name in (BEST, EARLIER_BEST)}
        record = self.best.record() if self.best is not None else None
        if record is not None:
            kept.add(self._path(record.step).resolve())
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

    def note_score(self, score: float) -> None:
        """Takes the score `best` of the weights at hand, on every rank. If it is better than any before, they are saved
        before the next step as the best ones: rank 0 decides, and tells all others.
        """
        self.state.score = score

    def note_final_score(self, trainer: L.Trainer, score: float) -> None:
        """Takes the score of the trained weights, whose checkpoint is written."""
        assert self.best is not None
        comparable = self._trained or self.best.record() is not None or not (self.folder / BEST).exists()
        self.state.unlinked = Unlinked(trainer.global_step, score if comparable else None)
        self._link()

    def _is_best(self, score: float | None) -> bool:
        return self.best is not None and score is not None and self.best.is_better(score)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        validating = self.state.phase == "validating"
        finished = self.state.phase == "finished"
        checkpoint[RUN_KEY] = {
            "config": self.identity(),
            "step": trainer.global_step,
            "logged_steps": lightning_fixes.logged_steps(trainer) + validating,
            **limits(trainer),
            "processes": world_size(),
            "workers": workers(trainer),
            "fp32_matmul": kernels.fp32_matmul(),
            "finished": finished,
            "validating": validating,
            "seconds": seconds_so_far(self.folder.parent),
            **samples_seen(trainer),
        }
        if self._saving:  # Lightning knows the position of those that its own callbacks take
            lightning_fixes.set_position(trainer, checkpoint, validating, finished)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resumed = checkpoint.get(RUN_KEY, {})
        same_limits = all(self._resumed.get(name) == limit for name, limit in limits(trainer).items())
        if self._resumed.get("finished") and same_limits:
            trainer.should_stop = True  # nothing is left to train, also where the run was stopped early
            print_rank_zero("the training is already finished: only scores and report are made again")
        before = self._resumed.get("fp32_matmul")
        if before and before != kernels.fp32_matmul():  # the two libraries round differently
            try:
                kernels.use_fp32_matmul(before)
            except ValueError as error:
                print_rank_zero(f"note: the run multiplied by {before}, which this process does not: {error}")
