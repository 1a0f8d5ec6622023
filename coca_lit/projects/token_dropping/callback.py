"""Token dropping (OpenVision 2, arXiv 2509.01644): in training the decoder sees a drawn share of the image tokens."""

from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from coca_lit.errors import check_number
from coca_lit.lit_module import CoCaLit


class TokenDropping(L.Callback):
    """In every training step the decoder attends to other image tokens, drawn for each image without replacement. In
    evaluation it attends to all of them.

    Args:
        share: of the tokens that are kept, at least one; about 0.35 in the paper.
    """

    def __init__(self, share: float = 0.35) -> None:
        check_number("share", share, above=0, at_most=1)
        self.share = share

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, CoCaLit)
        self._hook = pl_module.net.pooling.register_forward_hook(self._keep_some)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._hook.remove()

    def _keep_some(self, pooling: nn.Module, inputs: Any, output: tuple[Tensor | None, Tensor | None]) -> Any:
        vector, image_tokens = output
        if image_tokens is None or not pooling.training:
            return output
        return vector, drawn_tokens(image_tokens, self.share)


def drawn_tokens(image_tokens: Tensor, share: float) -> Tensor:
    """(B, Q, E) -> (B, K, E): K of the Q tokens of each image, in a random order, K the share of Q and at least 1."""
    count = image_tokens.shape[1]
    kept = max(1, round(share * count))
    order = torch.rand(image_tokens.shape[:2], device=image_tokens.device).argsort(dim=1)  # (B, Q)
    return image_tokens.take_along_dim(order[:, :kept, None], dim=1)
