"""OpenCLIP 4's modern text side: rotary positions (Su et al. 2021), RMSNorm, SwiGLU (Shazeer 2020), gated attention.

Nothing has a bias, and tokens have no position embedding: every self-attention rotates its queries and keys. There is
no CLS token; the text feature is pooled from the normed states, which the decoder reads too. The decoder has one block
per layer, whose cross-attention looks at the image tokens as they are. Blocks keep OpenCLIP's names of their tensors.

Shape letters as in `layers`; W is the width of a head.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.errors import check_choice, check_names, check_number
from coca_lit.models import kernels
from coca_lit.models.init import init_projection
from coca_lit.models.layers import KeysValues, attend_cached, by_image, merge_heads, split_heads
from coca_lit.models.packing import Cache, Layout, to_device
from coca_lit.models.registry import build_from
from coca_lit.models.text import Decoder, TextSizes, Tower
from coca_lit.models.trainable import run

TextPool = Literal["eos", "mean", "map"]


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
    def of(cls, width: int, **given: Any) -> "Style":
        """With MLPs of four times the width unless their width is given."""
        return cls(**{"mlp_width": 4 * width} | given)


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
        self.q_norm, self.k_norm = _head_norms(width // heads, style)

    def forward(
        self, x: Tensor, table: Tensor, mask: Tensor | None, cache: Cache | None, layout: Layout | None
    ) -> Tensor:
        """x (B, T, D), or rows packed as `layout` says, -> the same shape. Causal unless a boolean `mask`
        (B, 1, T or 1, T), True where attention is allowed, says otherwise.

        Args:
            table: of the positions (T,), or (N,) of packed rows.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # each (…, H, W)
        q, k = (rotate(norm(part), table).to(v.dtype) for norm, part in ((self.q_norm, q), (self.k_norm, k)))
        if cache is None:
            out = kernels.self_attention(torch.stack([q, k, v], dim=-3).flatten(-3), self.heads, mask, layout)
        else:
            out = attend_cached(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), cache, mask)
        return self.proj(out if self.gate is None else out * self.gate(x).sigmoid())


class ImageAttention(nn.Module):
    """Attention to image tokens as they are, without positions."""

    def __init__(self, width: int, image_width: int, heads: int, style: Style) -> None:
        super().__init__()
        self.heads = heads
        self.q = kernels.Linear(width, width, bias=False)
        self.kv = nn.Linear(image_width, 2 * width, bias=False)
        self.proj = kernels.Linear(width, width, bias=False)
        self.gate = kernels.Linear(width, width, bias=False) if style.gated else None
        self.q_norm, self.k_norm = _head_norms(width // heads, style)

    def keys_values(self, image_tokens: Tensor) -> KeysValues:
        """(B, S, E) -> keys and values, each (B, H, S, W)."""
        keys, values = (split_heads(part, self.heads) for part in self.kv(image_tokens).chunk(2, dim=-1))
        return self.k_norm(keys).to(values.dtype), values

    def forward(self, x: Tensor, image: Tensor | KeysValues, layout: Layout | None = None) -> Tensor:
        """x (B, T, D), or rows packed as `layout` says, -> the same shape.

        Args:
            image: tokens (B, S, E), or for padded x `keys_values` of them.
        """
        keys, values = self.keys_values(image) if isinstance(image, Tensor) else image
        q = self._queries(x if layout is None else layout.unpack(x)).to(values.dtype)
        out = merge_heads(kernels.attention(q, keys, values))
        out = out if layout is None else layout.pack(out)
        return self.proj(out if self.gate is None else out * self.gate(x).sigmoid())

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
        cache: Cache | None = None,
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


class MapPool(nn.Module):
    """One learned query that attends to the states of a text, without a projection of what it finds."""

    def __init__(self, width: int, heads: int, style: Style) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.q_norm, self.k_norm = _head_norms(width // heads, style)

    def init_parameters(self) -> None:
        for parameter in (self.query, self.q.weight, self.kv.weight):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        for norm in (self.q_norm, self.k_norm):
            if isinstance(norm, nn.RMSNorm):
                norm.reset_parameters()

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """states (B, T, D), mask (B, T), False where there is padding, -> (B, D)."""
        k, v = (split_heads(part, self.heads) for part in self.kv(states).chunk(2, dim=-1))  # (B, H, T, W)
        q = self.q_norm(split_heads(self.q(self.query), self.heads)).expand(len(states), -1, -1, -1)  # (B, H, 1, W)
        q, k = q.to(v.dtype), self.k_norm(k).to(v.dtype)
        return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]))[:, 0]


class ModernTextTower(Tower):
    """Token ids -> a normed state per token, and a text feature pooled from them.

    Args:
        pool: eos, the state of the last token; mean, of all tokens, start and end included; map, see `MapPool`.
        further: see `Style`.
    """

    def __init__(self, sizes: TextSizes, pool: TextPool = "eos", **style: Any) -> None:
        super().__init__(sizes)
        check_choice("pool", pool, get_args(TextPool))
        check_names("text_tower_args", style, ("pool", *Style._fields))
        width, heads = sizes.width, sizes.heads
        self.style = Style.of(width, **style)
        self.head_width = width // heads
        self.blocks = nn.ModuleList(ModernBlock(width, heads, self.style, sizes.dropout) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(width, self.style.norm_eps)
        self.pooled = pool
        self.pool = MapPool(width, heads, self.style) if pool == "map" else nn.Identity()
        self.projection = nn.Linear(width, sizes.embed_dim, bias=False)

    @property
    def contrastive_only(self) -> Sequence[str]:
        return ("pool", "projection") if isinstance(self.pool, MapPool) else ("projection",)

    def make_decoder(self, sizes: TextSizes, image_width: int, layers: int, **arguments: Any) -> "ModernDecoder":
        given = {"sizes": sizes, "image_width": image_width, "layers": layers}
        return build_from(ModernDecoder, "decoder_args", given, arguments)

    def init_parameters(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for block in cast("list[ModernBlock]", self.blocks):
            block.init_parameters(len(self.blocks))
        self.norm.reset_parameters()
        if isinstance(self.pool, MapPool):
            self.pool.init_parameters()
        init_projection(self.projection)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor,
        contrastive: bool = True,
        packed: bool | None = None,
        max_length: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Layout]:
        lengths = lengths.cpu()
        layout = Layout(lengths, packed, max_length, tokens.device)
        tokens = F.pad(tokens, (0, layout.max_length - tokens.shape[1]))  # (B, T); a negative padding cuts
        x = self.dropout(self.token_embedding(layout.pack(tokens)))
        table = rotary_table(layout.row_positions(), self.head_width, self.style.rope_base)
        recompute = self.training and self.grad_checkpointing == "blocks"
        for block in self.blocks:
            x = run(block, x, table, None, None, None, layout, recompute=recompute)
        x = self.norm(x)
        return x, self.projection(self._pool(x, lengths, layout)) if contrastive else None, layout

    def step(self, tokens: Tensor, caches: Sequence[Cache], mask: Tensor | None = None) -> Tensor:
        x = self.token_embedding(tokens)
        table = _next_table(x, caches, self.head_width, self.style.rope_base)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, table, None, mask, cache)
        return self.norm(x)

    def _pool(self, states: Tensor, lengths: Tensor, layout: Layout) -> Tensor:
        if self.pooled == "eos":  # a text ends in its end id, or else its last token stands for it
            return layout.gather_at(states, lengths - 1)
        grid = layout.unpack(states)  # (B, T, D)
        mask = to_device(layout.mask, grid.device)
        if self.pooled == "map":
            return self.pool(grid, mask)
        return (grid * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


class ModernDecoder(Decoder):
    """Causal blocks with rotary positions of their own, of which every n-th looks at the image tokens.

    Args:
        cross_attention_every: n; blocks 0, n, 2n … have cross-attention.
        further: see `Style`.
    """

    def __init__(
        self, sizes: TextSizes, image_width: int, layers: int, cross_attention_every: int = 1, **style: Any
    ) -> None:
        super().__init__()
        check_names("decoder_args", style, ("cross_attention_every", *Style._fields))
        check_number("cross_attention_every", cross_attention_every, whole=True, at_least=1)
        width, heads, dropout = sizes.width, sizes.heads, sizes.dropout
        self.style = Style.of(width, **style)
        self.head_width, self.every = width // heads, cross_attention_every
        widths = [image_width if i % cross_attention_every == 0 else None for i in range(layers)]
        self.blocks = nn.ModuleList(ModernBlock(width, heads, self.style, dropout, w) for w in widths)
        self.norm = nn.RMSNorm(width, self.style.norm_eps)
        self.vocabulary = kernels.Linear(width, sizes.vocab_size, bias=False)

    @property
    def cached_layers(self) -> int:
        return len(self.blocks)

    def layers(self) -> list[list[nn.Module]]:
        return [[block] for block in self.blocks]

    def init_parameters(self, tied: bool = False) -> None:
        for block in self._blocks():
            block.init_parameters(len(self.blocks))
        self.norm.reset_parameters()
        if not tied:
            init_projection(self.vocabulary)

    def keys_values(self, image_tokens: Tensor) -> list[KeysValues]:
        pairs = (block.xattn.keys_values(image_tokens) for block in self._blocks()[:: self.every])
        return [(keys.contiguous(), values.contiguous()) for keys, values in pairs]

    def forward(self, states: Tensor, image_tokens: Tensor | None, layout: Layout | None = None) -> Tensor:
        positions = torch.arange(states.shape[1], device=states.device) if layout is None else layout.row_positions()
        table = rotary_table(positions, self.head_width, self.style.rope_base)
        recompute = self.grad_checkpointing if self.training else "none"
        for i, block in enumerate(self.blocks):
            image = image_tokens if i % self.every == 0 else None
            again = recompute == "blocks" or (recompute == "cross_attention" and image is not None)
            states = run(block, states, table, image, None, None, layout, recompute=again)
        return self.norm(states)

    def step(
        self, states: Tensor, keys_values: list[KeysValues], caches: Sequence[Cache], mask: Tensor | None = None
    ) -> Tensor:
        table = _next_table(states, caches, self.head_width, self.style.rope_base)
        for i, (block, cache) in enumerate(zip(self.blocks, caches, strict=True)):
            image = keys_values[i // self.every] if i % self.every == 0 else None
            states = block(states, table, image, mask, cache)
        return self.norm(states)

    def attention(self, states: Tensor, image_tokens: Tensor) -> Tensor:
        table = rotary_table(torch.arange(states.shape[1], device=states.device), self.head_width, self.style.rope_base)
        image, total = self.keys_values(image_tokens), states.new_zeros(())
        for i, block in enumerate(self._blocks()):
            if i % self.every == 0:
                normed = block.norm1(states)
                queries = block.norm_x(states + block.attn(normed, table, None, None, None))
                queries = by_image(queries, len(image_tokens))
                total = total + block.xattn.weights(queries, image[i // self.every]).mean(dim=1)
            states = block(states, table, image[i // self.every] if i % self.every == 0 else None)
        return total.view(*states.shape[:2], image_tokens.shape[1]) / len(image)

    def _blocks(self) -> list[ModernBlock]:
        return cast("list[ModernBlock]", list(self.blocks))


def _next_table(x: Tensor, caches: Sequence[Cache], head_width: int, base: float) -> Tensor:
    """The rotary table of rows x (R, t, D) that continue the texts in the caches."""
    return rotary_table(torch.arange(x.shape[1], device=x.device) + caches[0].used, head_width, base)


def _head_norms(width: int, style: Style) -> tuple[nn.Module, nn.Module]:
    """Norms of the queries and of the keys of one head, shared by all heads."""
    if not style.qk_norm:
        return nn.Identity(), nn.Identity()
    return nn.RMSNorm(width, style.norm_eps), nn.RMSNorm(width, style.norm_eps)
