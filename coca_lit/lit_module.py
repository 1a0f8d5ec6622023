"""The only LightningModule: batch -> network -> raw losses -> weighted sum, and the optimizer."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from coca_lit.auxiliary import AuxiliaryLoss
from coca_lit.data.batch import Batch
from coca_lit.distributed import print_rank_zero
from coca_lit.losses import loss_terms
from coca_lit.models import CoCa
from coca_lit.models.coca import Contrastive
from coca_lit.models.text import GradCheckpointing
from coca_lit.training.gradient_caching import cached_loss
from coca_lit.training.optim import warmup_cosine
from coca_lit.training.self_critical import SelfCritical
from coca_lit.training.sharding import FullySharded, shard
from coca_lit.weights.load import MODEL_KEY


class CoCaLit(L.LightningModule):
    """Trains a CoCa.

    Args:
        net: the network.
        optimizer: makes an optimizer for the trainable parameters of a module, e.g. a partial of
            `coca_lit.training.optim.adamw`.
        warmup_steps: steps of linear warm-up before the cosine; the total comes from the trainer.
        contrastive_weight, caption_weight: factors of the two losses. A weight of 0 skips the loss and freezes what
            only it trains.
        text_weight: factor of the caption loss of batches that are texts alone.
        label_smoothing: share of every target of the caption loss that is spread over the vocabulary; in training only.
        self_critical: trains captions by their CIDEr-D instead of the caption loss, whose weight it then has.
        contrastive: which contrastive loss, softmax or siglip: that of the network.
        freeze: further parts of the network that stay as they are, see `CoCa.freeze`.
        grad_checkpointing: trade time for activation memory: none | cross_attention | blocks, see
            `CoCa.set_grad_checkpointing`.
        compile: run the transformer blocks through `torch.compile`.
        micro_batch_size: pairs that a process sends through the network at a time, see `gradient_caching`; None for
            the whole batch.
        auxiliary: further losses by name, each made for the network, e.g. by a partial of `AnswerClassifier`.
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
        self_critical: SelfCritical | None = None,
        contrastive: Contrastive = "softmax",
        freeze: Sequence[str] = (),
        grad_checkpointing: GradCheckpointing = "none",
        compile: bool = False,
        micro_batch_size: int | None = None,
        auxiliary: Mapping[str, Callable[[CoCa], AuxiliaryLoss]] | None = None,
    ) -> None:
        super().__init__()
        weights = {"contrastive": contrastive_weight, "caption": caption_weight}
        for name, weight in {**weights, "text": text_weight}.items():
            if not isinstance(weight, int | float) or isinstance(weight, bool) or weight < 0:
                raise ValueError(f"{name}_weight must be a number of at least 0, got {weight!r}")
        if net.decoder is None:
            weights["caption"] = 0.0  # a CLIP: there is nothing that could caption
        if not any(weights.values()) and not auxiliary:
            raise ValueError(
                "no loss is left to train with: at least one of contrastive_weight and caption_weight must be above 0"
            )
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing!r}")
        if contrastive != net.config["contrastive"]:
            raise ValueError(
                f"contrastive is '{contrastive}', but the network has that of '{net.config['contrastive']}'"
            )
        self.net = net
        self.weights = weights
        further = {name: make(net) for name, make in (auxiliary or {}).items()}
        if taken := further.keys() & {*weights, "text"}:
            raise ValueError(f"auxiliary: '{taken.pop()}' is the name of a loss of the network; choose another one")
        self.auxiliary = nn.ModuleDict(further)
        self.factors = {**weights, "text": text_weight, **{name: loss.weight for name, loss in further.items()}}
        self.warmup_steps = warmup_steps
        self.make_optimizer = optimizer
        self._freeze(freeze, {part for loss in further.values() for part in loss.trains})
        self.label_smoothing = label_smoothing
        self.self_critical = self_critical
        if self_critical is not None:
            self_critical.check(net, weights["caption"], micro_batch_size)
            self.factors["policy"] = weights["caption"]
        self.micro_batch_size = micro_batch_size
        if micro_batch_size is not None:
            _check_micro_batches(net, micro_batch_size)
            if self.auxiliary:
                raise ValueError("micro_batch_size does not go with auxiliary losses, which take the whole batch")
        if grad_checkpointing != "none":
            net.set_grad_checkpointing(grad_checkpointing)
        if compile:
            net.compile_blocks()

    def _freeze(self, parts: Sequence[str], trained: Collection[str]) -> None:
        """Freezes the given parts, and what only losses of weight 0 would train, but for what is `trained` anyway."""
        unused = [
            part
            for loss, weight in self.weights.items()
            if weight == 0
            for whole in self.net.parameters_of_loss(loss)
            for part in self._parts(whole, trained)
        ]
        for reason, names in (("as configured", parts), ("no loss with a weight above 0 trains them", unused)):
            if names:
                frozen = self.net.freeze(*names)
                print_rank_zero(f"frozen, {reason}: {', '.join(names)} ({len(frozen)} tensors)")

    def _parts(self, part: str, trained: Collection[str]) -> list[str]:
        """The part, or if some of it is trained all the same, its parts that are not."""
        if not any(name.startswith(f"{part}.") for name in trained):
            return [part]
        inside = (f"{part}.{name}" for name, _ in self.net.get_submodule(part).named_children())
        return [name for name in inside if name not in trained]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.micro_batch_size is not None and len(batch.images):
            pairs = (batch.images, batch.tokens, batch.lengths)
            size, smoothing = self.micro_batch_size, self.label_smoothing
            loss, terms = cached_loss(self.net, *pairs, size, self.weights, batch.prefix_lengths, smoothing)
        else:
            by_reward = self.self_critical is not None and len(batch.images)
            terms = self._rewarded(batch) if by_reward else self._losses(batch, self.label_smoothing)
            loss = torch.stack([self.factors[name] * term for name, term in terms.items()]).sum()
        self._log("train", terms, batch)
        self.log("train/logit_scale", self.net.logit_scale.exp().squeeze())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._log("val", self._losses(batch), batch)

    def _losses(self, batch: Batch, smoothing: float = 0.0) -> dict[str, Tensor]:
        """The raw terms whose weight is not 0."""
        if not len(batch.images):
            return {"text": loss_terms(self.net(None, batch.tokens, batch.lengths), smoothing)["caption"]}
        asked = {"contrastive": self.weights["contrastive"] != 0, "captioning": self.weights["caption"] != 0}
        out = self.net(batch.images, batch.tokens, batch.lengths, prefix_lengths=batch.prefix_lengths, **asked)
        return loss_terms(out, smoothing) | {name: loss(self.net, batch) for name, loss in self.auxiliary.items()}

    def _rewarded(self, batch: Batch) -> dict[str, Tensor]:
        """The raw terms of self-critical training: "policy" in place of "caption"."""
        assert self.self_critical is not None
        images = self.net.image_encoder(batch.images)  # once for all that follows
        policy, measures = self.self_critical(self.net, images, batch.keys)
        terms = {"policy": policy} | {name: loss(self.net, batch) for name, loss in self.auxiliary.items()}
        if self.weights["contrastive"]:
            terms |= loss_terms(self.net(images, batch.tokens, batch.lengths, captioning=False))
        named = {f"train/{name}": value for name, value in measures.items()}
        self.log_dict(named, prog_bar=True, sync_dist=True, batch_size=len(batch.images))
        return terms

    def _log(self, stage: str, terms: dict[str, Tensor], batch: Batch) -> None:
        named = {f"{stage}/{name}_loss": term.detach() for name, term in terms.items()}
        self.log_dict(named, prog_bar=True, sync_dist=True, batch_size=len(batch.tokens))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the global norm and logs it. Lightning's own way refuses fused optimizers under any mixed precision,
        though only fp16 has a loss scale that such an optimizer would still have to remove.
        """
        if self.trainer.precision == "16-mixed":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            norm = nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
            self.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.net.clamp_logit_scale()

    def setup(self, stage: str) -> None:
        if self.self_critical is not None and stage == "fit":
            self.self_critical.read(self.trainer.datamodule.training_captions())  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, FullySharded) and not isinstance(self.net, FSDPModule):
            assert self.device_mesh is not None
            shard(self.net, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.make_optimizer(self.net)
        for group in self.make_optimizer(self.auxiliary).param_groups if self.auxiliary else ():
            optimizer.add_param_group(group)
        scheduler = warmup_cosine(optimizer, self.warmup_steps, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[MODEL_KEY] = self.net.config  # plain values, so that the file explains itself and is safe to load


def _check_micro_batches(net: CoCa, size: int) -> None:
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"micro_batch_size must be a whole number of at least 1, got {size!r}")
    net.train()
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in net.modules()):
        raise ValueError(
            f"micro_batch_size does not go with the batch norms of {net.config['image_encoder']}, whose statistics "
            "would be those of a micro-batch: freeze the image encoder (model.freeze=[image_encoder]) or take one "
            "without batch norms"
        )
