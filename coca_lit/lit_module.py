"""The only LightningModule: batch -> network -> raw losses -> weighted sum, and the optimizer."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from coca_lit.checkpoints import MODEL_KEY
from coca_lit.data.batch import Batch
from coca_lit.distributed import say
from coca_lit.losses import caption_loss, contrastive_loss
from coca_lit.models import CoCa
from coca_lit.models.text import GradCheckpointing
from coca_lit.optim import warmup_cosine


class CoCaLit(L.LightningModule):
    """Trains a CoCa.

    Args:
        net: the network.
        optimizer: makes an optimizer for the trainable parameters of a module, e.g. a partial of
            `coca_lit.optim.adamw`.
        warmup_steps: steps of linear warm-up before the cosine; the total comes from the trainer.
        contrastive_weight, caption_weight: factors of the two losses. A weight of 0 skips the loss and freezes what
            only it trains.
        freeze: further parts of the network that stay as they are, e.g. `image_encoder`.
        grad_checkpointing: trade time for activation memory: none | cross_attention | blocks, see
            `CoCa.set_grad_checkpointing`.
        compile: run the transformer blocks through `torch.compile`.
    """

    def __init__(
        self,
        net: CoCa,
        optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer],
        warmup_steps: int = 0,
        contrastive_weight: float = 1.0,
        caption_weight: float = 2.0,
        freeze: Sequence[str] = (),
        grad_checkpointing: GradCheckpointing = "none",
        compile: bool = False,
    ) -> None:
        super().__init__()
        weights = {"contrastive": contrastive_weight, "caption": caption_weight}
        for name, weight in weights.items():
            if not isinstance(weight, int | float) or isinstance(weight, bool) or weight < 0:
                raise ValueError(f"{name}_weight must be a number of at least 0, got {weight!r}")
        if net.decoder is None:
            weights["caption"] = 0.0  # a CLIP: there is nothing that could caption
        if not any(weights.values()):
            raise ValueError(
                "no loss is left to train with: at least one of contrastive_weight and caption_weight must be above 0"
            )
        self.net = net
        self.weights = weights
        self.warmup_steps = warmup_steps
        self.make_optimizer = optimizer
        self._freeze(freeze)
        if grad_checkpointing != "none":
            net.set_grad_checkpointing(grad_checkpointing)
        if compile:
            net.compile_blocks()

    def _freeze(self, parts: Sequence[str]) -> None:
        unused = [
            part for loss, weight in self.weights.items() if weight == 0 for part in self.net.parameters_of_loss(loss)
        ]
        for reason, names in (("as configured", parts), ("no loss with a weight above 0 trains them", unused)):
            if names:
                frozen = self.net.freeze(*names)
                say(f"frozen, {reason}: {', '.join(names)} ({len(frozen)} tensors)")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        terms = self._losses(batch)
        self._log("train", terms, batch)
        self.log("train/logit_scale", self.net.logit_scale.exp().squeeze())
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._log("val", self._losses(batch), batch)

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        """The raw terms whose weight is not 0."""
        contrastive, captioning = self.weights["contrastive"] != 0, self.weights["caption"] != 0
        out = self.net(batch.images, batch.tokens, batch.lengths, contrastive=contrastive, captioning=captioning)
        terms = {}
        if contrastive:
            terms["contrastive"] = contrastive_loss(out.image_features, out.text_features, out.logit_scale)
        if captioning:
            terms["caption"] = caption_loss(out.hidden, out.vocabulary, out.labels)
        return terms

    def _log(self, stage: str, terms: dict[str, Tensor], batch: Batch) -> None:
        named = {f"{stage}/{name}_loss": term.detach() for name, term in terms.items()}
        self.log_dict(named, prog_bar=True, sync_dist=True, batch_size=len(batch.images))

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
            norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), gradient_clip_val)
            self.log("train/grad_norm", norm)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.net.clamp_logit_scale()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.make_optimizer(self.net)
        scheduler = warmup_cosine(optimizer, self.warmup_steps, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[MODEL_KEY] = self.net.config  # plain values, so that the file explains itself and is safe to load
