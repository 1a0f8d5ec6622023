"""Where Lightning does otherwise than exact resuming and speed need, and what it does not tell. Its private state is
used here, and besides in `lit_module.py` (`_trainer`) and `callbacks/averaging.py` (the exchange of weights). Numbers
are issues of github.com/Lightning-AI/pytorch-lightning.

It is written for Lightning 2.6, to which pyproject.toml pins it; tests/runs compares killed and resumed runs with
undisturbed ones bit by bit.
"""

from typing import Any, TypeVar

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.tensor import DTensor

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


def begun_epochs(checkpoint: dict[str, Any]) -> int:
    """How many epochs a checkpoint has seen, the one that it is within included."""
    within = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] > 0
    return int(checkpoint["epoch"]) + within


def set_position(trainer: L.Trainer, checkpoint: dict[str, Any], finished: bool) -> None:
    """Corrects the loops' counters in a checkpoint that is taken in `on_train_batch_start`, where the current batch has
    not begun yet (#18060), or when training is over (#19617).

    Args:
        finished: training is over. If more is asked for later, it begins at the batch after the last optimizer step.
    """
    loops = checkpoint["loops"]["fit_loop"]
    progress = loops["epoch_loop.batch_progress"]
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
