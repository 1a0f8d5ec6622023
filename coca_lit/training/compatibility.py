"""What goes with what in a training: the parts of a run state what they can do, and one table refuses. Besides, a batch
must split over processes and micro-batches, and values of Lightning's trainer must suit a training that resumes.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch.nn.utils.parametrize import is_parametrized

from coca_lit.data.datamodule import CaptionDataModule
from coca_lit.errors import ConfigError, check_number, error_context, why_unreadable
from coca_lit.models import CoCa
from coca_lit.runs.launch import launched_processes
from coca_lit.training.lightning_fixes import callbacks_of, is_sharded
from coca_lit.training.objectives import Objective, check_caption_count, without_replaced
from coca_lit.training.optim import Grouped

if TYPE_CHECKING:
    from coca_lit.lit_module import CoCaLit

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


def check_run(trainer: L.Trainer, module: "CoCaLit", data: Any) -> None:
    """Raises `ConfigError` if something does not go together, or the batch cannot be split over this many processes."""
    objectives = without_replaced(module.every_objective)
    check_together(features(trainer, module.net, objectives, module.micro_batch_size))
    check_caption_count(objectives, getattr(data, "captions", 1))
    _check_numbers(trainer)
    _check_processes(trainer)
    if isinstance(data, CaptionDataModule):
        _check_batch(data.batch_size, trainer.world_size, module.micro_batch_size)
        _check_interval(trainer, data)
    if isinstance(module.make_optimizer, Grouped) and any(p.requires_grad for p in module.net.parameters()):
        with error_context("model.optimizer"):
            module.make_optimizer.groups(module.net)
    _check_hyperparameters("data", data)
    _check_hyperparameters("model", module)


def features(
    trainer: L.Trainer, net: CoCa, objectives: Sequence[Objective], micro_batch_size: int | None
) -> dict[str, str]:
    """The features of a run, each with the key by which it was chosen.

    Args:
        objectives: those that train.
    """
    possible = {
        SHARDED: ("trainer=fsdp", is_sharded(trainer)),
        MICRO_BATCHES: ("trainer.micro_batch_size", micro_batch_size is not None),
        FP16: ("trainer.precision=16-mixed", trainer.precision == "16-mixed"),
        AVERAGES: ("ema", bool(callbacks_of(trainer, WeightAveraging))),
        LORA: ("lora", any(map(is_parametrized, net.modules()))),
        ACCUMULATION: ("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches > 1),
    }
    present = {feature: key for feature, (key, is_present) in possible.items() if is_present}
    for objective in objectives:
        key = objective.config_key
        if not objective.works_sharded:
            present.setdefault(NEEDS_WHOLE_WEIGHTS, key)
        if not objective.works_with_micro_batches:
            present.setdefault(NEEDS_WHOLE_BATCH, key)
        if objective.averages_tokens:
            present.setdefault(TOKEN_MEANS, key)
    return present


def check_together(present: Mapping[str, str]) -> None:
    """Raises `ConfigError` for the first row of the table of which a run has both features, see `features`."""
    for one, other, advice in TABLE:
        if one in present and other in present:
            raise ConfigError(f"{present[one]} does not work with {present[other]}: {advice}")


def _check_numbers(trainer: L.Trainer) -> None:
    if trainer.gradient_clip_algorithm not in (None, "norm"):
        raise ConfigError("trainer.gradient_clip_algorithm must be norm or null: the global norm is clipped")
    with error_context("trainer"):
        check_number("accumulate_grad_batches", trainer.accumulate_grad_batches, whole=True, at_least=1)
        check_number("limit_train_batches", trainer.limit_train_batches, above=0)
        if trainer.gradient_clip_val is not None:  # a negative norm would turn the gradients around
            check_number("gradient_clip_val", trainer.gradient_clip_val, at_least=0)


def _check_processes(trainer: L.Trainer) -> None:
    planned = trainer.num_devices * trainer.num_nodes  # under DDP, `world_size` is that of the launcher
    launched = launched_processes()
    if launched > planned:
        raise ConfigError(
            f"{launched} processes were started, but this configuration trains with {planned} (trainer.devices="
            f"{trainer.num_devices}): start as many, or do not set trainer.devices"
        )


def _check_batch(batch_size: int, processes: int, micro_batch_size: int | None) -> None:
    pairs_of_process, rest = divmod(batch_size, processes)
    if rest:
        raise ConfigError(
            f"data.batch_size: a global batch of {batch_size} cannot be split over {processes} processes: take a "
            "multiple"
        )
    if micro_batch_size is not None and pairs_of_process % micro_batch_size:
        raise ConfigError(
            f"data.batch_size: the {pairs_of_process} pairs of a process are no multiple of trainer.micro_batch_size="
            f"{micro_batch_size}"
        )


def _check_interval(trainer: L.Trainer, data: CaptionDataModule) -> None:
    """Refuses a validation that no epoch reaches: Lightning would, when the run has begun."""
    interval = trainer.val_check_interval
    limit = trainer.limit_train_batches
    if type(interval) is not int or not trainer.check_val_every_n_epoch or not trainer.limit_val_batches:
        return
    all_batches = data.batches_per_epoch
    batches = int(all_batches * limit) if isinstance(limit, float) else min(all_batches, limit)
    if interval > batches:
        raise ConfigError(
            f"trainer.val_check_interval={interval} is more than the {batches} batches of an epoch: to count on over "
            "epochs, set trainer.check_val_every_n_epoch=null too"
        )


def _check_hyperparameters(name: str, module: Any) -> None:
    """Refuses what a user's class keeps with `save_hyperparameters` and no checkpoint may hold."""
    stored = BytesIO()
    try:
        torch.save(dict(getattr(module, "hparams", {})), stored)
        stored.seek(0)
        torch.load(stored, weights_only=True)
    except Exception as error:  # anything may be among them
        raise ConfigError(
            f"{name}: save_hyperparameters() keeps what no checkpoint may hold ({why_unreadable(error)}): leave it "
            "out, or name it in ignore=[…]"
        ) from error
