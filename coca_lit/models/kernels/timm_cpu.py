"""What is to be known of timm's encoders from the inside: which stages they have, and which parts are slow on a CPU and
are computed in other ways with the same parameters.

Convolutions keep the channels of a place side by side in memory; what that and the rest are worth is measured in
experiments/benchmarks/convolutional.py.
"""

import torch
from timm.layers import Attention, Conv2dSame, PatchEmbed
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import ResNet
from torch import Tensor, nn

from coca_lit.models.kernels import packed_attention as ragged
from coca_lit.models.kernels.linear import Linear, linear


class PatchProjection(nn.Conv2d):
    """A convolution whose patches do not overlap is a linear layer on their pixels. As a convolution its gradient takes
    20 times as long in bf16.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) -> (B, D, h, w)"""
        height, width = self.kernel_size
        if x.shape[2] % height or x.shape[3] % width:
            return super().forward(x)
        patches = x.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, 3, h, height, w, width)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, h, w, 3 · height · width)
        return linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class ShortAttention(Attention):
    """Trains with the plain products of `ragged` where the fused kernel's backward pass is slow, in bf16 on a CPU, as
    long as the probabilities, which those keep, take no more memory than the queries.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (B, S, D) -> (B, S, D)"""
        batch, length, _ = x.shape
        plain = attn_mask is None and not is_causal and length <= self.head_dim
        if not (plain and self.training and _in_bf16_on_cpu(x)) or torch.compiler.is_compiling():
            return super().forward(x, attn_mask, is_causal)
        qkv = self.qkv(x).flatten(0, 1)  # (B·S, 3·D)
        attended = ragged.self_attention(qkv, self.num_heads, [length] * batch, None)
        return self.proj_drop(self.proj(attended.unflatten(0, (batch, length))))


class Depthwise(nn.Conv2d):
    """A convolution of each channel by itself. In bf16 its gradient is so slow on a CPU that the last stages of an
    EfficientNet take twice as long as with it in fp32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, h, w)"""
        trained = self.weight.requires_grad and self.weight.dtype == torch.float32 and torch.is_grad_enabled()
        if not (trained and _in_bf16_on_cpu(x)):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(x.dtype)


class DepthwiseSame(Depthwise, Conv2dSame):
    """The same with TensorFlow's padding."""


DEPTHWISE = {nn.Conv2d: Depthwise, Conv2dSame: DepthwiseSame}


def use_faster_parts(trunk: nn.Module) -> None:
    """Replaces what can be inside `trunk`. Classes and the order in memory change, modules and parameters stay."""
    for module in trunk.modules():
        if isinstance(module, PatchEmbed) and _is_patchwise(module.proj):
            module.proj.__class__ = PatchProjection
        elif type(module) is Attention and _is_plain(module):
            module.__class__ = ShortAttention
        elif isinstance(module, nn.Conv2d) and not isinstance(module, PatchProjection):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
            if module.groups > 1:
                module.__class__ = DEPTHWISE.get(type(module), type(module))
        elif type(module) is nn.Linear:
            module.__class__ = Linear


def stages(trunk: nn.Module) -> list[nn.Module]:
    """The modules that pixels go through one after the other; the trunk alone if its family does more than that."""
    if isinstance(trunk, EfficientNet):
        return [trunk.conv_stem, trunk.bn1, *trunk.blocks, trunk.conv_head, trunk.bn2]
    if isinstance(trunk, ResNet):
        return [trunk.conv1, trunk.bn1, trunk.act1, trunk.maxpool, *(getattr(trunk, f"layer{i}") for i in range(1, 5))]
    return [trunk]


def _is_patchwise(conv: nn.Module) -> bool:
    return type(conv) is nn.Conv2d and conv.stride == conv.kernel_size and conv.padding == (0, 0) and conv.groups == 1


def _is_plain(attention: Attention) -> bool:
    norms = (attention.q_norm, attention.k_norm, attention.norm)
    gate = getattr(attention, "gate", None)
    return all(isinstance(norm, nn.Identity) for norm in norms) and gate is None and attention.attn_drop.p == 0


def _in_bf16_on_cpu(x: Tensor) -> bool:
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.is_cpu and (autocast or x.dtype == torch.bfloat16)
