"""Batch norm over the global batch: with the statistics of each rank's own images, the result would depend on the
number of ranks.
"""

import torch
from timm.layers.norm_act import SyncBatchNormAct
from torch import Tensor, nn

from coca_lit.distributed import sum_over_ranks, world_size


class GlobalBatchNorm2d(SyncBatchNormAct):
    """timm's synchronised batch norm, which keeps the activation of the norm that it replaces, with a CPU version,
    which PyTorch lacks. In one process and in evaluation mode it computes what that norm does; names in the state dict
    stay.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.load_state_dict(norm.state_dict(), assign=True)
        self.train(norm.training)
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)"""
        if x.is_cpu and self.training and world_size() > 1:
            return self.act(self.drop(self._normalize_over_ranks(x)))
        return super().forward(x)

    def _normalize_over_ranks(self, x: Tensor) -> Tensor:
        count = x.numel() // x.shape[1] * world_size()
        with torch.autocast("cpu", enabled=False):
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
