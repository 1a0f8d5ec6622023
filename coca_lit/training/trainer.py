"""Lightning's trainer as our runs need it: what it is built from, and what is checked and set before it fits."""

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, WeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from torch.nn.utils.parametrize import is_parametrized

from coca_lit.data.datamodule import CaptionDataModule
from coca_lit.distributed import print_rank_zero
from coca_lit.errors import ConfigError, check_number, error_context, why_unreadable
from coca_lit.models import CoCa, kernels
from coca_lit.models.kernels.process import Fp32Matmul
from coca_lit.runs.checkpoint_io import save
from coca_lit.runs.launch import launched_devices, launched_processes, under_srun
from coca_lit.training.lightning_fixes import callbacks_of, is_sharded, say_which_rank_ended, set_ddp_options
from coca_lit.training.objectives import Objective, check_captions, without_replaced
from coca_lit.training.optim import Grouped
from coca_lit.weights.sharded import REST, is_folder, nested, read_tensors

if TYPE_CHECKING:
    from coca_lit.lit_module import CoCaLit


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes whole files or none, see `coca_lit.runs.checkpoint_io`, and reads plain values and tensors only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """As Lightning's, but never with code inside, whatever `weights_only` asks for. Where a GPU takes the tensors,
        the ranks of a machine map one copy of the file.
        """
        path = Path(path)
        mapped = torch.cuda.is_available()
        if not is_folder(path):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
        content = torch.load(path / REST, map_location=map_location, weights_only=True, mmap=mapped)
        return nested(content, read_tensors(path))


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


def full_precision_name(precision: str | int | None) -> str:
    """Lightning's full name of a precision, which it also takes as a number or a short name: 16 -> "16-mixed"."""
    short = {"64": "64-true", "32": "32-true", "None": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
    return short.get(str(precision), str(precision))


def prepare(trainer: L.Trainer, module: "CoCaLit", data: Any) -> None:
    """Checks that this trainer can fit this module to these data, and sets what of the trainer depends on them.

    Raises:
        ConfigError: something does not go together, or the batch cannot be split over this many processes.
    """
    objectives = without_replaced(module.every_objective)
    size = module.micro_batch_size
    has_schedule = getattr(data, "batch_schedule", None) is not None  # a user's DataModule may know of none
    if trainer.gradient_clip_algorithm not in (None, "norm"):
        raise ConfigError("trainer.gradient_clip_algorithm must be norm or null: the global norm is clipped")
    with error_context("trainer"):
        check_number("accumulate_grad_batches", trainer.accumulate_grad_batches, whole=True, at_least=1)
        check_number("limit_train_batches", trainer.limit_train_batches, above=0)
        if trainer.gradient_clip_val is not None:  # a negative norm would turn the gradients around
            check_number("gradient_clip_val", trainer.gradient_clip_val, at_least=0)
    check_together(features(trainer, module.net, objectives, size))
    planned = trainer.num_devices * trainer.num_nodes  # under DDP, `world_size` is that of the launcher
    launched = launched_processes()
    if launched > planned:
        raise ConfigError(
            f"{launched} processes were started, but this configuration trains with {planned} (trainer.devices="
            f"{trainer.num_devices}): start as many, or do not set trainer.devices"
        )
    if isinstance(data, CaptionDataModule):
        own, rest = divmod(data.batch_size, trainer.world_size)
        if rest:
            raise ConfigError(
                f"data.batch_size: a global batch of {data.batch_size} cannot be split over {trainer.world_size} "
                "processes: take a multiple"
            )
        if size is not None and own % size:
            raise ConfigError(
                f"data.batch_size: the {own} pairs of a process are no multiple of trainer.micro_batch_size={size}"
            )
        _check_interval(trainer, data)
    if isinstance(module.make_optimizer, Grouped) and any(p.requires_grad for p in module.net.parameters()):
        with error_context("model.optimizer"):
            module.make_optimizer.groups(module.net)
    for name, made in (("data", data), ("model", module)):
        try:
            torch.save(dict(getattr(made, "hparams", {})), file := BytesIO())
            torch.load(BytesIO(file.getvalue()), weights_only=True)
        except Exception as error:  # anything may be among them
            what = f"{name}: save_hyperparameters() keeps what no checkpoint may hold ({why_unreadable(error)})"
            raise ConfigError(f"{what}: leave it out, or name it in ignore=[…]") from error
    check_captions(objectives, getattr(data, "captions", 1))
    for objective in objectives:
        objective.take_data(data)
    varies = trainer.accumulate_grad_batches > 1 or size is not None or bool(module.objectives)
    set_ddp_options(trainer, ddp_options(has_schedule, same_graph=not varies))


def _check_interval(trainer: L.Trainer, data: CaptionDataModule) -> None:
    """Raises `ConfigError` for a validation that no epoch reaches: Lightning would, when the run has begun."""
    interval = trainer.val_check_interval
    limit = trainer.limit_train_batches
    if type(interval) is not int or not trainer.check_val_every_n_epoch or not trainer.limit_val_batches:
        return
    every = data.batches_per_epoch
    steps = int(every * limit) if isinstance(limit, float) else min(every, limit)
    if interval > steps:
        raise ConfigError(
            f"trainer.val_check_interval={interval} is more than the {steps} batches of an epoch: to count on over "
            "epochs, set trainer.check_val_every_n_epoch=null too"
        )


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


def choose_fp32_matmul(trainer: L.Trainer, module: L.LightningModule, library: Fp32Matmul) -> None:
    """Sets the library for fp32 matrix products on a CPU. A resumed run keeps the library that it had.

    Args:
        library: mkl, onednn or auto.
    """
    fp32_on_cpu = trainer.strategy.root_device.type == "cpu" and trainer.precision == "32-true"
    if fp32_on_cpu or library != "auto":
        with error_context("kernels"):
            chosen = kernels.use_fp32_matmul(library, sum(p.numel() for p in module.parameters()))
        print_rank_zero(f"fp32_matmul: {chosen}")


# What goes with what: the parts of a run state what they can do, and one table refuses.

SHARDED = "sharded"
MICRO_BATCHES = "micro_batches"
FP16 = "fp16"
AVERAGES = "averages"
LORA = "lora"
NEEDS_WHOLE_WEIGHTS, NEEDS_WHOLE_BATCH = "needs_whole_weights", "needs_whole_batch"  # objectives
ACCUMULATION = "accumulation"
TOKEN_MEANS = "token_means"
# Two features that do not go together, and what to do instead.
TABLE = (
    (SHARDED, AVERAGES, "set ema=null, or use trainer=ddp"),
    (SHARDED, LORA, "use trainer=ddp, where the gradients of LoRA need little memory"),
    (SHARDED, NEEDS_WHOLE_WEIGHTS, "use trainer=ddp"),
    (MICRO_BATCHES, FP16, "its loss scale comes after the gradients; use trainer.precision=bf16-mixed"),
    (MICRO_BATCHES, NEEDS_WHOLE_BATCH, "take a smaller batch"),
    (ACCUMULATION, TOKEN_MEANS, "use trainer.micro_batch_size, which averages over the tokens of the whole batch"),
)


def features(
    trainer: L.Trainer, net: CoCa, objectives: Sequence[Objective], micro_batch_size: int | None
) -> dict[str, str]:
    """The features of a run, each with the key by which it was chosen.

    Args:
        objectives: those that train.
    """
    found = {
        SHARDED: ("trainer=fsdp", is_sharded(trainer)),
        MICRO_BATCHES: ("trainer.micro_batch_size", micro_batch_size is not None),
        FP16: ("trainer.precision=16-mixed", trainer.precision == "16-mixed"),
        AVERAGES: ("ema", bool(callbacks_of(trainer, WeightAveraging))),
        LORA: ("lora", any(map(is_parametrized, net.modules()))),
        ACCUMULATION: ("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches > 1),
    }
    named = {feature: key for feature, (key, present) in found.items() if present}
    for objective in objectives:
        key = objective.config_key
        if not objective.works_sharded:
            named.setdefault(NEEDS_WHOLE_WEIGHTS, key)
        if not objective.works_with_micro_batches:
            named.setdefault(NEEDS_WHOLE_BATCH, key)
        if objective.averages_tokens:
            named.setdefault(TOKEN_MEANS, key)
    return named


def check_together(found: Mapping[str, str]) -> None:
    """Raises `ConfigError` for the first row of the table of which a run has both features, see `features`."""
    for one, other, advice in TABLE:
        if one in found and other in found:
            raise ConfigError(f"{found[one]} does not work with {found[other]}: {advice}")
