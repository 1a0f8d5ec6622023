"""Blocks of OpenCLIP 4's modern text side: rotary positions (Su et al. 2021), RMSNorm, SwiGLU (Shazeer 2020), gated
attention.

Nothing has a bias. Tokens have no position embedding: every self-attention rotates its queries and keys. Modules keep
OpenCLIP's names of their tensors.

Shape letters as in `coca_lit.models.layers`; W is the width of a head.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.models import kernels
from coca_lit.models.layers import KeysValues, attend_cached, by_image, merge_heads, split_heads
from coca_lit.models.packing import KVCache, Layout


class Style(NamedTuple):
    """Settings shared by the blocks of a tower.

    Args:
        mlp_width: hidden width of the MLPs.
        gated: attention outputs are multiplied by sigmoid(gate(x)).
        qk_norm: queries and keys are normed, each head by itself, before they are rotated.
        norm_eps: of all norms.
        rope_base: base of the angles.
    """

    mlp_width: int
    gated: bool = True
    qk_norm: bool = False
    norm_eps: float = 1e-6
    rope_base: float = 10000.0

    @classmethod
    def of(cls, width: int, mlp_width: int | None = None, **others: Any) -> "Style":
        """With MLPs of four times the width unless their width is given."""
        return cls(4 * width if mlp_width is None else mlp_width, **others)


def rotary_table(positions: Tensor, width: int, base: float) -> Tensor:
    """Cosines and sines (2, …, 1, W/2) for positions (…): position · base^(-2i/W) for the pair i of channels."""
    exponents = torch.arange(0, width, 2, device=positions.device) / width
    angles = positions[..., None, None] * base**-exponents
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x (…, H, W) with the pairs of channels (2i, 2i + 1) turned by the angles of `rotary_table`."""
    cos, sin = table.to(x.dtype)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class RotaryAttention(nn.Module):
    def __init__(self, width: int, heads: int, style: Style) -> None:
        super().__init__()
        if width % heads or width // heads % 2:
            raise ValueError(f"the width ({width}) must be a multiple of twice the number of heads ({heads})")
        self.heads = heads
        self.qkv = kernels.Linear(width, 3 * width, bias=False)
        self.proj = kernels.Linear(width, width, bias=False)
        self.gate = kernels.Linear(width, width, bias=False) if style.gated else None
        self.q_norm, self.k_norm = head_norms(width // heads, style)

    def forward(
        self, x: Tensor, table: Tensor, mask: Tensor | None, cache: KVCache | None, layout: Layout | None
    ) -> Tensor:
        """x (B, T, D), or rows packed as `layout` says, -> the same shape. Causal unless a boolean `mask`
        (B, 1, T or 1, T), True where attention is allowed, says otherwise.

        Args:
            table: of the positions (T,), or (N,) of packed rows.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # each (…, H, W)
        q = rotate(self.q_norm(q), table).to(v.dtype)
        k = rotate(self.k_norm(k), table).to(v.dtype)
        if cache is None:
            qkv = torch.stack([q, k, v], dim=-3).flatten(-3)
            out = kernels.self_attention(qkv, self.heads, mask, layout)
        else:
            out = attend_cached(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), cache, mask)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj(out)


class ImageAttention(nn.Module):
    """Attention to image tokens as they are, without positions."""

    def __init__(self, width: int, image_width: int, heads: int, style: Style) -> None:
        super().__init__()
        self.heads = heads
        self.q = kernels.Linear(width, width, bias=False)
        self.kv = nn.Linear(image_width, 2 * width, bias=False)
        self.proj = kernels.Linear(width, width, bias=False)
        self.gate = kernels.Linear(width, width, bias=False) if style.gated else None
        self.q_norm, self.k_norm = head_norms(width // heads, style)

    def keys_values(self, image_tokens: Tensor) -> KeysValues:
        """(B, S, E) -> keys and values, each (B, H, S, W)."""
        keys, values = self.kv(image_tokens).chunk(2, dim=-1)
        keys = split_heads(keys, self.heads)
        values = split_heads(values, self.heads)
        return self.k_norm(keys).to(values.dtype), values

    def forward(self, x: Tensor, image: Tensor | KeysValues, layout: Layout | None = None) -> Tensor:
        """x (B, T, D), or rows packed as `layout` says, -> the same shape.

        Args:
            image: tokens (B, S, E), or for padded x `keys_values` of them.
        """
        keys, values = self.keys_values(image) if isinstance(image, Tensor) else image
        q = self._queries(x if layout is None else layout.unpack(x)).to(values.dtype)
        out = merge_heads(kernels.attention(q, keys, values))
        if layout is not None:
            out = layout.pack(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj(out)

    def weights(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        """How much each position of x (B, T, D) attends to each image token: (B, H, T, S), rows add up to 1."""
        q = self._queries(x)
        return (q @ keys_values[0].mT * q.shape[-1] ** -0.5).softmax(dim=-1)

    def _queries(self, x: Tensor) -> Tensor:
        return self.q_norm(split_heads(self.q(x), self.heads))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = kernels.Linear(width, 2 * hidden, bias=False)
        self.w3 = kernels.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.w12(x).chunk(2, dim=-1)
        return self.w3(value * F.silu(gate))


class ModernBlock(nn.Module):
    """x + attention(norm(x)), with an image width x + cross-attention(norm(x)), and x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, style: Style, dropout: float, image_width: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width, style.norm_eps)
        self.attn = RotaryAttention(width, heads, style)
        if image_width is not None:
            self.norm_x = nn.RMSNorm(width, style.norm_eps)
            self.xattn = ImageAttention(width, image_width, heads, style)
        self.norm2 = nn.RMSNorm(width, style.norm_eps)
        self.mlp = SwiGLU(width, style.mlp_width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        image: Tensor | KeysValues | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """x (B, T, D), or rows packed as `layout` says, -> the same shape. Without an image, cross-attention is
        skipped.

        Args:
            image: tokens (B, S, E), or for padded x their keys and values.
        """
        x = x + self.dropout(self.attn(self.norm1(x), table, mask, cache, layout))
        if image is not None:
            queries = self.norm_x(x)
            if layout is None and not isinstance(image, Tensor):  # the captions of an image side by side
                queries = by_image(queries, image[0].shape[0])
            x = x + self.dropout(self.xattn(queries, image, layout)).view_as(x)
        return x + self.dropout(self.mlp(self.norm2(x)))

    def init_parameters(self, depth: int) -> None:
        """OpenCLIP 4's values for a tower of `depth` blocks."""
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                module.reset_parameters()
        width = self.norm1.normalized_shape[0]
        branch_std = width**-0.5 * (2 * depth) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith(("proj.weight", "w3.weight")):
                nn.init.normal_(parameter, std=branch_std)
            elif name.endswith("w12.weight"):
                nn.init.normal_(parameter, std=1.22 * (2 * width) ** -0.5)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=width**-0.5)


def head_norms(width: int, style: Style) -> tuple[nn.Module, nn.Module]:
    """Norms of the queries and of the keys of one head, shared by all heads."""
    if not style.qk_norm:
        return nn.Identity(), nn.Identity()
    return nn.RMSNorm(width, style.norm_eps), nn.RMSNorm(width, style.norm_eps)
