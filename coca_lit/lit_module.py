"""The only LightningModule: batch -> network -> weighted losses -> their sum, and the optimizer."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from coca_lit.data.batch import Batch
from coca_lit.data.batch_schedule import BatchSchedule
from coca_lit.distributed import print_rank_zero
from coca_lit.errors import ConfigError, check_number
from coca_lit.models import CoCa
from coca_lit.models.trainable import GradCheckpointing
from coca_lit.training.lightning_fixes import (
    accumulation_factor,
    clear_logged_values,
    clip_gradients,
    is_sharded,
    logs_this_step,
)
from coca_lit.training.objectives import (
    Captions,
    Contrastive,
    Objective,
    Terms,
    check_names_of_terms,
    named_objectives,
    terms_of,
    without_replaced,
)
from coca_lit.training.optim import check_resumable, optimizer_of, warmup_cosine, warmup_stable_decay
from coca_lit.training.optim import freeze as freeze_parts
from coca_lit.weights import MODEL_KEY, OBJECTIVES_KEY

SETTINGS = ("initial_lr", "weight_decay", "betas", "eps")  # of an optimizer that a user sets, besides `arguments`
SETUP_CHECK = 2  # steps of a run that but checks a set-up, as with trainer=smoke


class CoCaLit(L.LightningModule):
    """Trains a CoCa.

    Args:
        net: the network.
        optimizer: makes an optimizer for the trainable parameters of a module, see `coca_lit.training.optim.AdamW`.
        warmup_steps: steps of linear warm-up before the cosine; the total comes from the trainer.
        contrastive_weight: factor of the contrastive loss; 0 skips it and freezes what only it trains.
        caption_weight: factor of the caption loss; 0 skips it and freezes what only it trains, the decoder.
        label_smoothing: in the caption loss, the share of every target that is spread over the vocabulary in training;
            `objectives` have their own.
        freeze: further parts of the network to freeze, see `CoCa.freeze`; or a single one.
        grad_checkpointing: trade time for activation memory: none | cross_attention | blocks, see
            `CoCa.set_grad_checkpointing`.
        compile: run the transformer blocks through `torch.compile`; of image encoders only timm's ViTs.
        micro_batch_size: pairs that a process sends through the network at a time, see `gradient_caching`; None for
            the whole batch.
        objectives: losses besides CoCa's own, {name of your choice: objective or function}; None leaves one out.
        cooldown_steps: replaces the cosine by a constant rate and a cooldown of this many steps, see
            `warmup_stable_decay`. 0: no cooldown, as for a trunk from which runs of several lengths branch.
        batch_schedule: gives batches of another source between batches of pairs, and says what they are trained for.

    Attributes:
        loss_weights: of the "contrastive" and the "caption" loss; 0 for one that is skipped.
        built_in: CoCa's own objectives, without those of weight 0, and those of `batch_schedule`.
        objectives: those of the argument, by name.
        optimizer_settings: of each group of the optimizer, as configured.
    """

    def __init__(
        self,
        net: CoCa,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        warmup_steps: int = 0,
        contrastive_weight: float = 1.0,
        caption_weight: float = 2.0,
        label_smoothing: float = 0.0,
        freeze: Sequence[str] = (),
        grad_checkpointing: GradCheckpointing = "none",
        compile: bool = False,
        micro_batch_size: int | None = None,
        objectives: Mapping[str, Callable[..., Any] | None] = MappingProxyType({}),
        cooldown_steps: int | None = None,
        batch_schedule: BatchSchedule | None = None,
    ) -> None:
        super().__init__()
        check_number("warmup_steps", warmup_steps, whole=True, at_least=0)
        if cooldown_steps is not None:
            check_number("cooldown_steps", cooldown_steps, whole=True, at_least=0)
        if micro_batch_size is not None:
            check_number("micro_batch_size", micro_batch_size, whole=True, at_least=1)
        self.net = net
        self.optimizer_settings: list[dict[str, Any]] = []
        self.make_optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.cooldown_steps = cooldown_steps
        self.micro_batch_size = micro_batch_size
        caption_weight = 0.0 if net.decoder is None else caption_weight
        self.loss_weights = {"contrastive": contrastive_weight, "caption": caption_weight}
        own_losses = (Contrastive(contrastive_weight), Captions(caption_weight, label_smoothing))
        self.built_in = nn.ModuleList(loss for loss in own_losses if any(loss.weights.values()))
        self.batch_schedule = batch_schedule
        if batch_schedule is not None:
            self.built_in.extend(batch_schedule.objectives)
        self.objectives = nn.ModuleDict(named_objectives(objectives or {}))
        if not any(self.loss_weights.values()) and not self.objectives:
            raise ValueError("no loss is left: contrastive_weight or caption_weight must be above 0")
        check_names_of_terms(self.every_objective)
        for objective in self.every_objective:
            objective.build(net)
        trained = {
            part for objective in without_replaced(self.every_objective) for part in objective.trained_parts(net)
        }
        freeze_parts(net, freeze, trained)
        if grad_checkpointing != "none":
            net.set_grad_checkpointing(grad_checkpointing)
        if compile:
            net.compile_blocks()

    @property
    def configured_objectives(self) -> list[Objective]:
        """Those of `objectives`."""
        return [cast(Objective, objective) for objective in self.objectives.values()]

    @property
    def every_objective(self) -> list[Objective]:
        """The built-in objectives and the configured ones."""
        built_in = [cast(Objective, objective) for objective in self.built_in]
        return [*built_in, *self.configured_objectives]

    def objectives_of(self, batch: Batch) -> list[Objective]:
        """What a batch is trained for, or in evaluation measured by."""
        taking = [objective for objective in self.every_objective if objective.takes(batch)]
        if self.training:
            return without_replaced(taking)
        return [objective for objective in taking if not objective.replaces]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        clear_logged_values(self.trainer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted sum of the losses of a batch, a scalar.

        Raises:
            ConfigError: the batch trains nothing, since all that its losses reach is frozen.
        """
        objectives = self.objectives_of(batch)
        if self.micro_batch_size is None:
            terms = terms_of(self.net, objectives, batch)
            loss = terms.weighted_sum(objectives)
        else:
            from coca_lit.training.gradient_caching import cached_loss

            loss, terms = cached_loss(self.net, objectives, batch, self.micro_batch_size)
        if self.logs_this_step():
            self.log_terms("train", terms, batch)
            for objective in objectives:
                self.log_values("train", objective.measures, batch)
            scale = self.net.logit_scale.detach().exp()
            self.log("train/logit_scale", (scale.full_tensor() if isinstance(scale, DTensor) else scale).squeeze())
        if not loss.requires_grad:
            keys = " and ".join(objective.config_key for objective in objectives)
            raise ConfigError(f"{keys}: all parameters that it reaches are frozen; see model.freeze and lora.parts")
        return loss * (accumulation_factor(self.trainer, batch_idx) if self._trainer is not None else 1.0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log_terms("val", terms_of(self.net, self.objectives_of(batch), batch), batch)

    def logs_this_step(self) -> bool:
        """Values are averaged over ranks and read by the host at these steps only: either takes time."""
        return self._trainer is not None and logs_this_step(self.trainer)

    def log_terms(self, stage: str, terms: Terms, batch: Batch) -> None:
        self.log_values(stage, {f"{name}_loss": term.detach() for name, term in terms.values.items()}, batch)

    def log_values(self, stage: str, values: Mapping[str, Any], batch: Batch) -> None:
        named = {f"{stage}/{name}": value for name, value in values.items()}
        self.log_dict(named, prog_bar=True, sync_dist=True, batch_size=len(batch.tokens))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the global norm and logs it."""
        if gradient_clip_val:
            norm = clip_gradients(self.trainer, self, optimizer, gradient_clip_val)
            if self.logs_this_step():
                self.log("train/grad_norm", norm)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.check_norms()

    def on_fit_start(self) -> None:
        """Says which objectives a model is saved without."""
        from coca_lit.weights.kept import described_objectives

        kept = described_objectives(self.objectives)
        for name, objective in self.objectives.items():
            if name not in kept and objective.state_dict():
                print_rank_zero(
                    f"note: what model.objectives.{name} trains is in checkpoints of this run alone: load_model and "
                    "evaluations lack it unless its class has @register_objective or stands in [objectives] of a "
                    "project.toml"
                )

    def check_norms(self) -> None:
        """Called before training, after low-rank adaptation, which freezes batch norms, if there is any.

        Raises:
            ValueError: micro-batches do not work with those that train.
        """
        if self.micro_batch_size is not None:
            from coca_lit.training.gradient_caching import check_norms

            check_norms(self.net)

    def configure_model(self) -> None:
        if is_sharded(self.trainer) and not isinstance(self.net, FSDPModule):
            from coca_lit.training.sharding import shard, shard_objective

            assert self.device_mesh is not None
            mesh, bf16 = self.device_mesh["data_parallel"], self.trainer.precision == "bf16-mixed"
            shard(self.net, mesh, half=bf16 and mesh.device_type == "cuda")
            for objective in self.objectives.values():
                shard_objective(objective, mesh)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = optimizer_of(self.make_optimizer, self.net, self.objectives)
        # Before any callback sees the weights, such as `Averaging`.
        optimizer.register_step_post_hook(lambda *_: self.net.clamp_logit_scale())
        warmup = self.warmup_steps
        total = int(self.trainer.estimated_stepping_batches)
        if total < 0:
            raise ConfigError("trainer.max_steps: the learning rate needs it, since the training data have no length")
        if self.cooldown_steps is None:
            if SETUP_CHECK < total < warmup:
                print_rank_zero(
                    f"warning: model.warmup_steps={warmup} is more than the {total:,} steps of the run, whose learning "
                    f"rate ends at {total / warmup:.0%} of its value: set it to fewer, such as {max(total // 10, 1)}"
                )
            scheduler = warmup_cosine(optimizer, warmup, total)
        else:
            scheduler = warmup_stable_decay(optimizer, warmup, total, self.cooldown_steps)
        keys = (*SETTINGS, *getattr(self.make_optimizer, "arguments", ()))
        self.optimizer_settings = [
            {key: group[key] for key in keys if key in group} for group in optimizer.param_groups
        ]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" in checkpoint and checkpoint.get("optimizer_states"):  # neither sharded nor weights alone
            optimizer = optimizer_of(self.make_optimizer, self.net, self.objectives)
            check_resumable(checkpoint, self.state_dict(), optimizer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        from coca_lit.weights.kept import described_objectives

        kept = described_objectives(self.objectives)
        if kept:
            checkpoint[OBJECTIVES_KEY] = kept
        # Plain values, so that the file explains itself and is safe to load.
        checkpoint[MODEL_KEY] = self.net.config.stored()
