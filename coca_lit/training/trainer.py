"""Lightning's trainer as our runs need it: what it is built from, and what is set before it fits."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from coca_lit.errors import ConfigError
from coca_lit.runs.launch import launched_devices, under_srun
from coca_lit.training.compatibility import check_run
from coca_lit.training.lightning_fixes import say_which_rank_ended, set_ddp_options
from coca_lit.training.objectives import without_replaced
from coca_lit.training.safe_checkpoints import SafeCheckpointIO

if TYPE_CHECKING:
    from coca_lit.lit_module import CoCaLit


def trainer_parts(
    callbacks: Sequence[L.Callback], loggers: Sequence[Logger], accelerator: str, strategy: Any, precision: Any
) -> dict[str, Any]:
    """The arguments of `Trainer` that are objects or depend on the machine. Plugins make checkpoint files safe, and
    under srun leave requeueing to us: Lightning would save within the signal handler, in the middle of a step.

    Raises:
        ConfigError: Lightning's strategy of that name cannot shard the network.
    """
    name = (strategy if isinstance(strategy, str) else type(strategy).__name__).lower()
    if any(part in name for part in ("deepspeed", "fsdp", "modelparallel")):
        raise ConfigError(
            f"trainer.strategy={name} does not know how to shard the network: use trainer=ddp, or trainer=fsdp if the "
            "model does not fit one GPU"
        )
    say_which_rank_ended()
    plugins: list[Any] = [SafeCheckpointIO()]
    if under_srun() and not TorchElasticEnvironment.detect():
        # `srun --ntasks=2` sets no number per node, without which Lightning refuses to start.
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(launched_devices()))
        plugins.append(SLURMEnvironment(auto_requeue=False))
    # The monitor refuses to train without loggers.
    kept = [callback for callback in callbacks if loggers or not isinstance(callback, LearningRateMonitor)]
    return {
        "callbacks": kept,
        "logger": list(loggers),
        "accelerator": accelerator,
        "precision": precision,
        "strategy": strategy,
        "plugins": plugins,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in kept),  # no default one
    }


def prepare(trainer: L.Trainer, module: "CoCaLit", data: Any) -> None:
    """Checks that this trainer can fit this module to these data, and sets what of the trainer depends on them.

    Raises:
        ConfigError: something does not go together, see `check_run`, or the data lack what an objective needs.
    """
    check_run(trainer, module, data)
    for objective in without_replaced(module.every_objective):
        objective.take_data(data)
    has_schedule = getattr(data, "batch_schedule", None) is not None  # a user's DataModule may know of none
    in_parts = trainer.accumulate_grad_batches > 1 or module.micro_batch_size is not None
    same_graph = not in_parts and not module.objectives
    set_ddp_options(trainer, ddp_options(has_schedule, same_graph))


def ddp_options(has_schedule: bool, same_graph: bool) -> dict[str, bool]:
    """Arguments of DistributedDataParallel: gradients live in the buffers that are sent.

    Args:
        has_schedule: some batches are of another source, and may use other parameters. Each step looks which ones were
            used, as it would wait for ever for the gradients of the others.
        same_graph: every step is forward and backward of the same parts, so it need not look for the end of each.
    """
    return {
        "gradient_as_bucket_view": True,
        "find_unused_parameters": has_schedule,
        "static_graph": same_graph and not has_schedule,
    }
