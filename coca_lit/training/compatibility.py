"""What goes with what in a training: the parts of a run state what they can do, and one table refuses."""

from collections.abc import Mapping
from typing import NamedTuple

import lightning.pytorch as L
from lightning.pytorch.callbacks import WeightAveraging

from coca_lit.errors import ConfigError
from coca_lit.models import CoCa
from coca_lit.training.lightning_fixes import callbacks_of, is_sharded
from coca_lit.training.objectives import Objective
from coca_lit.weights.lora import LowRank

SHARDED, MICRO_BATCHES, FP16, AVERAGES, LORA = "sharded", "micro_batches", "fp16", "averages", "lora"
NEEDS_WHOLE_WEIGHTS, NEEDS_WHOLE_BATCH = "needs_whole_weights", "needs_whole_batch"  # objectives
TEXTS, NO_DECODER = "texts", "no_decoder"
ACCUMULATION, TOKEN_MEANS = "accumulation", "token_means"


class Row(NamedTuple):
    """Two features that do not go together, and what to do instead."""

    one: str
    other: str
    advice: str


TABLE = (
    Row(SHARDED, MICRO_BATCHES, "use trainer=ddp, or save memory with model.grad_checkpointing=blocks"),
    Row(SHARDED, AVERAGES, "set ema=null, or use trainer=ddp"),
    Row(SHARDED, LORA, "use trainer=ddp, where the gradients of LoRA need little memory"),
    Row(SHARDED, NEEDS_WHOLE_WEIGHTS, "use trainer=ddp"),
    Row(MICRO_BATCHES, FP16, "its loss scale comes after the gradients; use trainer.precision=bf16-mixed"),
    Row(MICRO_BATCHES, NEEDS_WHOLE_BATCH, "take a smaller batch"),
    Row(ACCUMULATION, TOKEN_MEANS, "use trainer.micro_batch_size, which averages over the tokens of the whole batch"),
    Row(TEXTS, NO_DECODER, "texts train the decoder, so give the model one or set data.text=null"),
)


def features(
    trainer: L.Trainer, net: CoCa, objectives: Mapping[str, Objective], micro_batch_size: int | None, texts: bool
) -> dict[str, str]:
    """The features of a run, each with the key by which it was chosen.

    Args:
        objectives: those that train, besides `Texts`, by key.
        texts: some batches are texts alone.
    """
    found = {
        SHARDED: ("trainer=fsdp", is_sharded(trainer)),
        MICRO_BATCHES: ("trainer.micro_batch_size", micro_batch_size is not None),
        FP16: ("trainer.precision=16-mixed", trainer.precision == "16-mixed"),
        AVERAGES: ("ema", bool(callbacks_of(trainer, WeightAveraging))),
        LORA: ("lora", any(isinstance(part, LowRank) for part in net.modules())),
        ACCUMULATION: ("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches > 1),
        TEXTS: ("data.text", texts),
        NO_DECODER: ("model.net.decoder_layers=0", net.decoder is None),
    }
    named = {feature: key for feature, (key, present) in found.items() if present}
    for key, objective in objectives.items():
        if not objective.works_sharded:
            named.setdefault(NEEDS_WHOLE_WEIGHTS, key)
        if not objective.works_with_micro_batches:
            named.setdefault(NEEDS_WHOLE_BATCH, key)
        if objective.averages_tokens:
            named.setdefault(TOKEN_MEANS, key)
    if texts:
        named.setdefault(TOKEN_MEANS, "data.text")
    return named


def check_together(found: Mapping[str, str]) -> None:
    """Raises `ConfigError` for the first row of the table of which a run has both features, see `features`."""
    for one, other, advice in TABLE:
        if one in found and other in found:
            raise ConfigError(f"{found[one]} does not work with {found[other]}: {advice}")
