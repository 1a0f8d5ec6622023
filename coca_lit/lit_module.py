"""The only LightningModule: batch -> network -> weighted losses -> their sum, and the optimizer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from coca_lit.data.batch import Batch
from coca_lit.distributed import print_rank_zero
from coca_lit.errors import ConfigError, check_number
from coca_lit.models import CoCa
from coca_lit.models.trainable import GradCheckpointing
from coca_lit.training.lightning_fixes import clip_gradients, forget_last_step, is_logged_step, is_sharded, step_share
from coca_lit.training.objectives import Objective, OfFeatures, Pairs, Texts, named_objectives
from coca_lit.training.optim import check_resumable, optimizer_of, warmup_cosine, warmup_stable_decay
from coca_lit.training.optim import freeze as freeze_parts
from coca_lit.weights import CLASSIFIERS_KEY, MODEL_KEY

if TYPE_CHECKING:
    from coca_lit.training.self_critical import SelfCritical

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
        text_weight: factor of the caption loss on batches of texts without images.
        label_smoothing: in the caption loss of pairs and of texts, see `Pairs`; `objectives` have their own.
        self_critical: trains captions by their CIDEr-D; replaces the caption loss and takes its weight.
        freeze: further parts of the network to freeze, see `CoCa.freeze`; or a single one.
        grad_checkpointing: trade time for activation memory: none | cross_attention | blocks, see
            `CoCa.set_grad_checkpointing`.
        compile: run the transformer blocks through `torch.compile`; of image encoders only timm's ViTs.
        micro_batch_size: pairs that a process sends through the network at a time, see `gradient_caching`; None for
            the whole batch.
        objectives: further losses on pairs, {name of your choice: objective or function}; None leaves one out.
        cooldown_steps: replaces the cosine by a constant rate and a cooldown of this many steps, see
            `warmup_stable_decay`. 0: no cooldown, as for a trunk from which runs of several lengths branch.
        texts: some batches are texts without images, which train the decoder even if `caption_weight` is 0.
    """

    def __init__(
        self,
        net: CoCa,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        warmup_steps: int = 0,
        contrastive_weight: float = 1.0,
        caption_weight: float = 2.0,
        text_weight: float = 1.0,
        label_smoothing: float = 0.0,
        self_critical: "SelfCritical | None" = None,
        freeze: Sequence[str] = (),
        grad_checkpointing: GradCheckpointing = "none",
        compile: bool = False,
        micro_batch_size: int | None = None,
        objectives: Mapping[str, Callable[..., Any] | None] = MappingProxyType({}),
        cooldown_steps: int | None = None,
        texts: bool = False,
    ) -> None:
        super().__init__()
        check_number("warmup_steps", warmup_steps, whole=True, at_least=0)
        if cooldown_steps is not None:
            check_number("cooldown_steps", cooldown_steps, whole=True, at_least=0)
        self.net = net
        self.configured: list[dict[str, Any]] = []  # the settings of each group of the optimizer
        self.make_optimizer = optimizer
        self.warmup_steps, self.cooldown_steps = warmup_steps, cooldown_steps
        caption_weight = 0.0 if net.decoder is None else caption_weight
        weights = (contrastive_weight, caption_weight, label_smoothing)
        if micro_batch_size is None:
            self.pairs = Pairs(*weights)
        else:
            from coca_lit.training.gradient_caching import MicroBatchedPairs

            self.pairs = MicroBatchedPairs(micro_batch_size, *weights)
        self.texts = Texts(text_weight, label_smoothing)
        self.self_critical = self_critical
        further = named_objectives(objectives or {})
        self.objectives = nn.ModuleDict(further)
        for objective in (self.pairs, self.texts, *further.values()):
            objective.build(net)
        trained = {part for made in further.values() for part in made.trains}
        if texts and text_weight > 0:
            trained.add("decoder")
        freeze_parts(net, freeze, self.pairs.weights, trained)
        self.pairs.join(made for made in further.values() if isinstance(made, OfFeatures))
        if not any(self.pairs.weights.values()) and not further:
            raise ValueError("no loss is left: contrastive_weight or caption_weight must be above 0")
        if self_critical is not None:
            self_critical.check(net, self.pairs)
            self_critical.weights = {"policy": caption_weight, "contrastive": contrastive_weight}
        if grad_checkpointing != "none":
            net.set_grad_checkpointing(grad_checkpointing)
        if compile:
            net.compile_blocks()

    def further_objectives(self) -> dict[str, Objective]:
        """Those besides `Pairs` and `Texts`, by the keys of their configuration."""
        found = {f"model.objectives.{name}": cast(Objective, made) for name, made in self.objectives.items()}
        return found | ({"model.self_critical": self.self_critical} if self.self_critical is not None else {})

    @property
    def reads_captions(self) -> bool:
        """Whether a loss reads the captions of images."""
        further = (made.reads_captions for made in self.further_objectives().values())
        return any(self.pairs.weights.values()) or any(further)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        forget_last_step(self.trainer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted sum of the losses of a batch, a scalar.

        Raises:
            ConfigError: texts train nothing of the network, since all that they reach is frozen.
        """
        losses: list[Tensor] = []
        for objective in self.objectives_of(batch):
            loss, terms = objective.loss(self.net, batch)
            losses.append(loss)
            if self.is_logged():
                self.log_terms("train", terms, batch)
                for made in (objective, *(self.pairs.joined if objective is self.pairs else ())):
                    self.log_values("train", made.measures, batch)
        if self.is_logged():
            self.log("train/logit_scale", self.net.logit_scale.exp().squeeze())
        total = torch.stack(losses).sum()
        if not len(batch.images) and not total.requires_grad:
            raise ConfigError("data.text: all that texts reach is frozen; see model.freeze and lora.parts")
        return total * (step_share(self.trainer, batch_idx) if self._trainer is not None else 1.0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        for objective in self.objectives_of(batch):
            self.log_terms("val", objective(self.net, batch), batch)

    def objectives_of(self, batch: Batch) -> Iterator[Objective]:
        """What a batch is trained for, or measured by in evaluation."""
        if not len(batch.images):
            yield self.texts
            return
        further = cast(Iterator[Objective], self.objectives.values())
        if self.self_critical is not None and self.training:
            yield self.self_critical
            yield from further
            return
        if any(self.pairs.weights.values()) or self.pairs.joined:
            yield self.pairs
        yield from (made for made in further if made not in self.pairs.joined)

    def is_logged(self) -> bool:
        """Values are averaged over ranks and read by the host at these steps only: either takes time."""
        return self._trainer is not None and is_logged_step(self.trainer)

    def log_terms(self, stage: str, terms: Mapping[str, Tensor], batch: Batch) -> None:
        self.log_values(stage, {f"{name}_loss": term.detach() for name, term in terms.items()}, batch)

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
            if self.is_logged():
                self.log("train/grad_norm", norm)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.pairs.check_norms(self.net)
        if self.self_critical is not None and stage == "fit":
            self.self_critical.read(self.trainer.datamodule.training_captions())  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        if is_sharded(self.trainer) and not isinstance(self.net, FSDPModule):
            from coca_lit.training.sharding import shard

            assert self.device_mesh is not None
            mesh, bf16 = self.device_mesh["data_parallel"], self.trainer.precision == "bf16-mixed"
            shard(self.net, mesh, half=bf16 and mesh.device_type == "cuda")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = optimizer_of(self.make_optimizer, self.net, self.objectives)
        # Before any callback sees the weights, such as `Averaging`.
        optimizer.register_step_post_hook(lambda *_: self.net.clamp_logit_scale())
        steps = warmup, total = self.warmup_steps, int(self.trainer.estimated_stepping_batches)
        if total < 0:
            raise ConfigError("trainer.max_steps: the learning rate needs it, since the training data have no length")
        if self.cooldown_steps is None:
            if SETUP_CHECK < total < warmup:
                print_rank_zero(
                    f"warning: model.warmup_steps={warmup} is more than the {total:,} steps of the run, whose learning "
                    f"rate ends at {total / warmup:.0%} of its value: set it to fewer, such as {max(total // 10, 1)}"
                )
            scheduler = warmup_cosine(optimizer, *steps)
        else:
            scheduler = warmup_stable_decay(optimizer, *steps, self.cooldown_steps)
        named = (*SETTINGS, *getattr(self.make_optimizer, "arguments", ()))
        self.configured = [{key: group[key] for key in named if key in group} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" in checkpoint and checkpoint.get("optimizer_states"):  # neither sharded nor weights alone
            optimizer = optimizer_of(self.make_optimizer, self.net, self.objectives)
            check_resumable(checkpoint, self.state_dict(), optimizer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if found := {name: made.config for name, made in self.objectives.items() if made.config}:
            checkpoint[CLASSIFIERS_KEY] = found
        # Plain values, so that the file explains itself and is safe to load.
        checkpoint[MODEL_KEY] = asdict(self.net.config)
