"""Batch norm over the global batch: with the statistics of each rank's own images, a network with batch norms would be
another one on every number of ranks.

`torch.nn.SyncBatchNorm` has no CPU version, and converting timm's norms to it loses the activations inside them.
"""

import torch
from torch import Tensor, nn

from coca_lit.distributed import sum_over_ranks, world_size


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Takes the place of a batch norm of timm, with its names in the state dict. In one process, and in evaluation
    mode, it computes the same.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.load_state_dict(norm.state_dict(), assign=True)
        self.train(norm.training)
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)"""
        x = self._normalize_over_ranks(x) if self.training and world_size() > 1 else super().forward(x)
        return self.act(self.drop(x))

    def _normalize_over_ranks(self, x: Tensor) -> Tensor:
        count = x.numel() // x.shape[1] * world_size()
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            mean = sum_over_ranks(wide.sum(dim=(0, 2, 3))) / count  # (C,)
            variance = sum_over_ranks((wide - mean.view(-1, 1, 1)).square().sum(dim=(0, 2, 3))) / count  # (C,)
            scale = (variance + self.eps).rsqrt()
            scale = scale * self.weight if self.affine else scale
            shift = self.bias - mean * scale if self.affine else -mean * scale
            self._update_running(mean.detach(), variance.detach() * count / max(count - 1, 1))
            return (wide * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(x.dtype)

    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(variance.to(self.running_var.dtype), weight)


def use_global_batch_norms(module: nn.Module) -> None:
    """Replaces every batch norm inside `module`."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, GlobalBatchNorm2d(child))
        else:
            use_global_batch_norms(child)
