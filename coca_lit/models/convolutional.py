"""What convolutional image encoders need: batch norms over the global batch, and stages.

With the statistics of each rank's own images, a network with batch norms would be another one on every number of ranks.
`torch.nn.SyncBatchNorm` has no CPU version, and converting timm's norms to it loses the activations inside them.

Stages that are frozen at the beginning of an encoder are computed once for all epochs.
"""

from collections.abc import Sequence

import torch
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import ResNet
from torch import Tensor, nn

from coca_lit.distributed import sum_over_ranks, world_size
from coca_lit.errors import DataError


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
            if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
                weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                unbiased = variance.detach() * count / max(count - 1, 1)
                self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), weight)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight)
            return (wide * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(x.dtype)


def use_global_batch_norms(module: nn.Module) -> None:
    """Replaces every batch norm of PyTorch or timm inside `module`. One of another class may compute something else: it
    stays as it is, with the statistics of its own process.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and type(child).__module__.startswith(("torch.", "timm.")):
            setattr(module, name, GlobalBatchNorm2d(child))
        else:
            use_global_batch_norms(child)


class FrozenStages(nn.Module):
    """The first stages of an encoder: pixels (B, 3, H, W) -> the input of the next one, as tokens (B, H'·W', C).

    Args:
        width: of the encoder's output. Where C equals it, the encoder could not tell one from the other: `DataError`.
    """

    def __init__(self, normalise: nn.Module, stages: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.normalise = normalise
        self.stages = nn.Sequential(*stages)
        self.width = width

    def forward(self, images: Tensor) -> Tensor:
        tokens = as_tokens(self.stages(self.normalise(images)))
        if tokens.shape[2] == self.width:
            raise DataError(
                f"the frozen stages of the image encoder are {self.width} wide, as is its output: freeze all of it "
                "(model.freeze=[image_encoder]), or set data.cached_augmentations=0"
            )
        return tokens


def stages_of(trunk: nn.Module) -> list[nn.Module]:
    """The modules that pixels pass one after the other; the trunk alone if its family does more than that."""
    if isinstance(trunk, EfficientNet):
        return [trunk.conv_stem, trunk.bn1, *trunk.blocks, trunk.conv_head, trunk.bn2]
    if isinstance(trunk, ResNet):
        return [trunk.conv1, trunk.bn1, trunk.act1, trunk.maxpool, *(getattr(trunk, f"layer{i}") for i in range(1, 5))]
    return [trunk]


def frozen_stages(trunk: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The stages before the first one that is trained, and the others; where all are frozen, none and all."""
    stages = stages_of(trunk)
    trained = [any(p.requires_grad for p in stage.parameters()) for stage in stages]
    count = trained.index(True) if any(trained) else 0
    return stages[:count], stages[count:]


def as_tokens(features: Tensor, channels_last: bool = False) -> Tensor:
    """Tokens (B, S, C) unchanged, grids (B, C, H, W) or (B, H, W, C) as tokens."""
    if features.ndim == 3:
        return features
    return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
