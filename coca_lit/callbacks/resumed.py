"""What a resumed run says, and which settings it takes from its own config in place of the checkpoint."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
from torch.optim.lr_scheduler import LambdaLR

from coca_lit.distributed import print_rank_zero, world_size
from coca_lit.training import lightning_fixes

LIMITS = ("max_epochs", "max_steps")


def announce(trainer: L.Trainer, before: dict[str, Any]) -> None:
    """Says where the run goes on, and what differs from the processes that trained it so far.

    Args:
        before: what `Checkpoints` kept in the checkpoint.
    """
    counts = "".join(f", {before[unit]:,} {unit} seen" for unit in ("samples", "tokens") if unit in before)
    print_rank_zero(f"resuming after step {trainer.global_step} in epoch {trainer.current_epoch + 1}{counts}")
    for limit in LIMITS:
        now = getattr(trainer, limit)
        if limit in before and before[limit] != now:
            print_rank_zero(
                f"note: {limit} was {before[limit]} and is now {now}: from here on the learning rate follows it"
            )
    changed = []
    for unit, count in (("processes", world_size()), ("workers", workers(trainer))):
        if before.get(unit, count) != count:
            changed.append(f"{before[unit]} {unit} became {count}")
    if changed:
        print_rank_zero(f"note: {' and '.join(changed)}: every batch holds the same samples as before")


def apply_settings(trainer: L.Trainer, configured: Sequence[dict[str, Any]]) -> None:
    """Gives the groups of a restored optimizer the settings of this run's config in place of the checkpoint's, and the
    learning rate that its schedule has at this step. They differ only with an explicit `ckpt_path`: `auto` refuses a
    config that has changed.

    Args:
        configured: the settings of each group; empty for a module that is not `CoCaLit`, whose groups stay as they
            were. So do the groups of a subclass with its own schedule.
    """
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    if not configured or not schedulers:
        return
    scheduler = schedulers[0]
    if not isinstance(scheduler, LambdaLR):
        return
    (optimizer,) = trainer.optimizers
    scheduler.base_lrs = [settings["initial_lr"] for settings in configured]
    for group, settings, factor in zip(optimizer.param_groups, configured, scheduler.lr_lambdas, strict=True):
        group |= settings | {"lr": settings["initial_lr"] * factor(scheduler.last_epoch)}


def limits(trainer: L.Trainer) -> dict[str, Any]:
    """What ends a training."""
    return {limit: getattr(trainer, limit) for limit in LIMITS} | {"max_time": lightning_fixes.max_time(trainer)}


def workers(trainer: L.Trainer) -> int:
    """Processes that read the training data of a rank."""
    return getattr(getattr(trainer, "datamodule", None), "num_workers", 0)
