"""Layers of timm's encoders that are slow on a CPU, computed in other ways with the same parameters.

Each class takes over the parameters of the layer that it replaces, so the names in the state dict stay the same.
experiments/benchmarks/convolutional.py measures them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, Conv2dSame, PatchEmbed
from torch import Tensor, nn

from coca_lit.models.kernels.cpu_linear import Linear, linear
from coca_lit.models.kernels.fast_attention import attend_text_by_text
from coca_lit.models.kernels.process import enabled


class PatchProjection(nn.Conv2d):
    """A convolution whose patches do not overlap is a linear layer on their pixels. As a convolution its gradient takes
    20 times as long in bf16.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) -> (B, D, h, w)"""
        height, width = self.kernel_size
        if not enabled() or x.shape[2] % height or x.shape[3] % width:
            return super().forward(x)
        patches = x.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, 3, h, height, w, width)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, h, w, 3 · height · width)
        return linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class ShortAttention(nn.Module):
    """timm's attention without norms and gate.

    Where the fused kernel's backward pass is slow, in bf16 on a CPU, it trains with plain products, as long as the
    probabilities, which these keep, take no more memory than the queries, and none are dropped.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.head_dim = attention.head_dim
        self.qkv = attention.qkv
        self.proj = attention.proj
        self.proj_drop = attention.proj_drop
        self.attn_drop_rate = attention.attn_drop.p
        self.train(attention.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (B, S, D) -> (B, S, D)"""
        batch, length, _ = x.shape
        qkv = self.qkv(x)  # (B, S, 3·D)
        dropped = self.attn_drop_rate if self.training else 0.0
        slow = self.training and _in_bf16_on_cpu(x) and not torch.compiler.is_compiling()
        if slow and not dropped and attn_mask is None and not is_causal and length <= self.head_dim:
            attended = attend_text_by_text(qkv.flatten(0, 1), self.num_heads, [length] * batch, None)
            attended = attended.unflatten(0, (batch, length))
        else:
            q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)  # each (B, H, S, D/H)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p=dropped, is_causal=is_causal)
            attended = attended.transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(attended))


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


def replace_timm_layers(trunk: nn.Module) -> None:
    """Replaces the layers inside `trunk` that have a faster form. The weights of all other convolutions become
    channels-last.
    """
    for parent in list(trunk.modules()):
        for name, layer in parent.named_children():
            if isinstance(parent, PatchEmbed) and name == "proj" and _is_patchwise(layer):
                setattr(parent, name, _convolution(PatchProjection, layer))
            elif type(layer) is Attention and _is_plain(layer):
                setattr(parent, name, ShortAttention(layer))
            elif isinstance(layer, nn.Conv2d):
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
                if layer.groups > 1 and type(layer) in (nn.Conv2d, Conv2dSame):
                    kind = DepthwiseSame if type(layer) is Conv2dSame else Depthwise
                    setattr(parent, name, _convolution(kind, layer))
    for parent in list(trunk.modules()):  # including the layers of a new ShortAttention
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:
                fast = Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
                setattr(parent, name, _take_over(fast, layer))


def _convolution(kind: type[nn.Conv2d], layer: nn.Module) -> nn.Module:
    assert isinstance(layer, nn.Conv2d)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    sizes: dict[str, Any] = {name: getattr(layer, name) for name in names}
    return _take_over(kind(**sizes, bias=layer.bias is not None, device="meta"), layer)


def _take_over(fast: nn.Module, layer: nn.Module) -> nn.Module:
    """`fast` with the parameters of `layer`."""
    fast.weight = layer.weight
    fast.bias = layer.bias
    return fast.train(layer.training)


def _is_patchwise(conv: nn.Module) -> bool:
    return type(conv) is nn.Conv2d and conv.stride == conv.kernel_size and conv.padding == (0, 0) and conv.groups == 1


def _is_plain(attention: Attention) -> bool:
    norms = (attention.q_norm, attention.k_norm, attention.norm)
    gate = getattr(attention, "gate", None)
    return all(isinstance(norm, nn.Identity) for norm in norms) and gate is None


def _in_bf16_on_cpu(x: Tensor) -> bool:
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return enabled() and x.is_cpu and (autocast or x.dtype == torch.bfloat16)
