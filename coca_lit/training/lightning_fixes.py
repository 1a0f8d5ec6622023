"""Where Lightning does otherwise than exact resuming and speed need, and what it does not tell. Its private state is
used here, and besides in `lit_module.py` (`_trainer`) and `callbacks/averaging.py` (the exchange of weights). Numbers
are issues of github.com/Lightning-AI/pytorch-lightning.

It is written for Lightning 2.6, to which pyproject.toml pins it; tests/runs compares killed and resumed runs with
undisturbed ones bit by bit.
"""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from subprocess import Popen, TimeoutExpired
from typing import Any, TypeVar

import lightning.pytorch as L
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.tensor import DTensor

from coca_lit.errors import TrainingError

Kind = TypeVar("Kind", bound=L.Callback)


def callbacks_of(trainer: L.Trainer, kind: type[Kind]) -> list[Kind]:
    """The trainer's callbacks of a class, in their order."""
    return [callback for callback in getattr(trainer, "callbacks", ()) if isinstance(callback, kind)]


def max_time(trainer: L.Trainer) -> float | None:
    """`trainer.max_time` in seconds, which the trainer hands to a callback and does not keep."""
    return next((timer._duration for timer in callbacks_of(trainer, Timer)), None)


def is_sharded(trainer: L.Trainer) -> bool:
    """Whether its strategy is `coca_lit.training.sharding.FullySharded`, the only one of its kind that `trainer_parts`
    lets pass. No other training imports that module.
    """
    return isinstance(trainer.strategy, ModelParallelStrategy)


# Processes


def say_which_rank_ended() -> None:
    """Has Lightning say why it ends all processes with SIGKILL: one that it started has ended. It tells its log alone,
    at a level that is not shown. No issue is known.
    """
    end_all: Callable[[_ChildProcessObserver], None] = _ChildProcessObserver._terminate_all
    if hasattr(end_all, "__wrapped__"):
        return

    @wraps(end_all)
    def end_all_and_say_why(observer: _ChildProcessObserver) -> None:
        for ended in ended_ranks(observer._child_processes):
            print(f"error: {ended}", file=sys.stderr, flush=True)
        end_all(observer)

    _ChildProcessObserver._terminate_all = end_all_and_say_why  # type: ignore[assignment,method-assign]


def ended_ranks(processes: Sequence[Popen[bytes]]) -> list[str]:
    """A sentence for each rank that failed or was killed, of those that the first process has started."""
    codes = {rank: process.poll() for rank, process in enumerate(processes, start=1)}
    causes = {
        rank: f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        for rank, code in codes.items()
        if code
    }
    end = "so all ranks are ended; the same command resumes from the newest checkpoint"
    return [f"rank {rank} {cause}, {end}" for rank, cause in causes.items()]


@contextmanager
def error_of_an_ended_rank(trainer: L.Trainer) -> Iterator[None]:
    """Names the rank that ended, where the first process notices it by an error of its connection and not by looking.

    Raises:
        TrainingError: a rank that Lightning has started failed or was killed.
    """
    try:
        yield
    except RuntimeError as error:
        processes = getattr(trainer.strategy.launcher, "procs", [])
        with suppress(TimeoutExpired):  # the connection ends before the process does
            for process in processes:
                process.wait(0.5)
        ended = ended_ranks(processes)
        if ended:
            raise TrainingError("; ".join(ended)) from error
        raise


# Which step this is


def accumulates(trainer: L.Trainer) -> bool:
    """Whether the gradients of the current batch wait for more batches, so that it ends no step."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def accumulation_factor(trainer: L.Trainer, batch_idx: int) -> float:
    """The factor of the loss of a batch with which a step has the mean over its batches: Lightning divides by
    `accumulate_grad_batches`, also where an epoch ends with fewer. No issue is known.
    """
    count = trainer.accumulate_grad_batches
    batches = trainer.num_training_batches
    last = batches % count if count > 1 else 0
    return count / last if last and batch_idx >= batches - last else 1.0


def logs_this_step(trainer: L.Trainer) -> bool:
    """Whether Lightning logs the step that is being made, or it is the last one."""
    last = trainer.global_step + 1 >= trainer.estimated_stepping_batches
    return trainer._logger_connector.should_update_logs or last


def logged_step_ended(trainer: L.Trainer) -> bool:
    """Whether the batch that has just ended also ended a step that Lightning logs."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and trainer.global_step % every == 0 and not accumulates(trainer)


def is_between_steps(trainer: L.Trainer) -> bool:
    """Whether the weights are those after the last whole batch, and no gradient waits for more batches."""
    loop = trainer.fit_loop.epoch_loop
    batches = loop.batch_progress.state_dict()["current"]
    steps = loop.automatic_optimization.optim_progress
    stepped = steps.optimizer.step.total.ready == steps.optimizer.step.total.completed
    at_a_step = batches["completed"] % trainer.accumulate_grad_batches == 0
    return batches["processed"] == batches["completed"] and stepped and at_a_step


# Logs


def clear_logged_values(trainer: L.Trainer) -> None:
    """Drops the values that earlier steps of the epoch logged, which Lightning repeats in every row: a row holds what
    its own step measured, and is the same whether the run was resumed in between or not. No issue is known.
    """
    results = trainer._results
    assert results is not None
    for value in results.values():
        value._forward_cache = None


def logged_steps(trainer: L.Trainer) -> int:
    """The `step` that the next logged metrics get."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def set_logged_steps(trainer: L.Trainer, steps: int) -> None:
    """Corrects that number: Lightning counts one step too many when it resumes between two batches (#19367)."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = steps


# Processes


def leave_sigterm_to_us(trainer: L.Trainer) -> None:
    """Keeps Lightning from asking all ranks before every batch whether one got SIGTERM, which waits for the device
    (#21487): `Checkpoints` asks them too.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def set_ddp_options(trainer: L.Trainer, options: dict[str, bool]) -> None:
    """Arguments of DistributedDataParallel that the config leaves open. `strategy=auto` takes none, and only the
    trainer tells whether that is DDP.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy._ddp_kwargs = options | strategy._ddp_kwargs


# Gradients


def clip_gradients(
    trainer: L.Trainer, module: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float
) -> torch.Tensor:
    """Clips the global norm and returns it. Lightning's own way refuses fused optimizers under mixed precision
    (#21435), because they divide by the loss scale of fp16 in their step; here it is done before.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):  # else it is done already
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# Where a resumed run begins


def can_repeat_validation(trainer: L.Trainer) -> bool:
    """Not while gradients wait for more batches, nor after the last step: Lightning would consider the run finished."""
    return not accumulates(trainer) and not 0 <= trainer.max_steps <= trainer.global_step


def repeat_validation(trainer: L.Trainer) -> None:
    """The resumed run begins with the validation in which it was stopped. Lightning would make its last batch alone
    (#20288).
    """
    trainer.fit_loop.epoch_loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION


def begun_epochs(checkpoint: dict[str, Any]) -> int:
    """How many epochs a checkpoint has seen, the one that it is within included."""
    within = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] > 0
    return int(checkpoint["epoch"]) + within


def set_position(trainer: L.Trainer, checkpoint: dict[str, Any], validating: bool, finished: bool) -> None:
    """Corrects the loops' counters in a checkpoint that is taken in `on_train_batch_start`, where the current batch has
    not begun yet (#18060), or when training is over (#19617).

    Args:
        validating: it is taken within a validation, which will be repeated from its first batch.
        finished: training is over. If more is asked for later, it begins at the batch after the last optimizer step.
    """
    loops = checkpoint["loops"]["fit_loop"]
    progress, validation = (loops[f"epoch_loop.{loop}batch_progress"] for loop in ("", "val_loop."))
    if validating:
        for count, batches in validation["current"].items():
            validation["total"][count] -= batches
        validation["current"] = dict.fromkeys(validation["current"], 0)
    if finished and trainer.fit_loop.epoch_loop._num_ready_batches_reached():
        progress["current"] = dict.fromkeys(progress["current"], 0)
    elif finished:  # within an epoch, which Lightning counts as done
        without_step = progress["current"]["completed"] % trainer.accumulate_grad_batches  # their gradients are lost
        for count in ("current", "total"):
            progress[count]["completed"] -= without_step
            for done in ("processed", "completed"):
                loops["epoch_progress"][count][done] -= 1
        checkpoint["epoch"] -= 1
    for counts in (progress["current"], progress["total"]):
        counts.update(dict.fromkeys(counts, counts["completed"]))
    progress["is_last_batch"] = False
