"""OpenCLIP 4's modern text side: a tower without a CLS token, whose text feature is pooled from the normed states that
the decoder reads too, and a decoder with one block per layer, whose cross-attention looks at the image tokens as they
are.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.errors import check_choice, check_names, check_number
from coca_lit.models import kernels
from coca_lit.models.init import init_projection
from coca_lit.models.layers import KeysValues, by_image, merge_heads, split_heads
from coca_lit.models.packing import KVCache, Layout, to_device
from coca_lit.models.registry import build_from
from coca_lit.models.text import Decoder, TextSizes, Tower
from coca_lit.models.trainable import run
from coca_lit.projects.coca2.blocks import ModernBlock, Style, head_norms, rotary_table

TextPool = Literal["eos", "mean", "map"]


class MapPool(nn.Module):
    """One learned query that attends to the states of a text, without a projection of what it finds."""

    def __init__(self, width: int, heads: int, style: Style) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.q_norm, self.k_norm = head_norms(width // heads, style)

    def init_parameters(self) -> None:
        for parameter in (self.query, self.q.weight, self.kv.weight):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        for norm in (self.q_norm, self.k_norm):
            if isinstance(norm, nn.RMSNorm):
                norm.reset_parameters()

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """states (B, T, D), mask (B, T), False where there is padding, -> (B, D)."""
        keys, values = self.kv(states).chunk(2, dim=-1)
        values = split_heads(values, self.heads)  # (B, H, T, W)
        keys = self.k_norm(split_heads(keys, self.heads)).to(values.dtype)
        query = self.q_norm(split_heads(self.q(self.query), self.heads)).to(values.dtype)  # (1, H, 1, W)
        queries = query.expand(len(states), -1, -1, -1)
        found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None])
        return merge_heads(found)[:, 0]


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
        self.blocks = nn.ModuleList()
        for _ in range(sizes.layers):
            self.blocks.append(ModernBlock(width, heads, self.style, sizes.dropout))
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
        features = self.projection(self._pool(x, lengths, layout)) if contrastive else None
        return x, features, layout

    def step(self, tokens: Tensor, caches: Sequence[KVCache], mask: Tensor | None = None) -> Tensor:
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
        self.head_width = width // heads
        self.every = cross_attention_every
        self.blocks = nn.ModuleList()
        for i in range(layers):
            looks = i % self.every == 0
            self.blocks.append(ModernBlock(width, heads, self.style, dropout, image_width if looks else None))
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
        found: list[KeysValues] = []
        for block in self._blocks()[:: self.every]:
            keys, values = block.xattn.keys_values(image_tokens)
            found.append((keys.contiguous(), values.contiguous()))
        return found

    def forward(self, states: Tensor, image_tokens: Tensor | None, layout: Layout | None = None) -> Tensor:
        positions = torch.arange(states.shape[1], device=states.device) if layout is None else layout.row_positions()
        table = rotary_table(positions, self.head_width, self.style.rope_base)
        wanted = self.grad_checkpointing if self.training else "none"
        for i, block in enumerate(self.blocks):
            image = image_tokens if i % self.every == 0 else None
            recompute = wanted == "blocks" or (wanted == "cross_attention" and image is not None)
            states = run(block, states, table, image, None, None, layout, recompute=recompute)
        return self.norm(states)

    def step(
        self, states: Tensor, keys_values: list[KeysValues], caches: Sequence[KVCache], mask: Tensor | None = None
    ) -> Tensor:
        table = _next_table(states, caches, self.head_width, self.style.rope_base)
        for i, (block, cache) in enumerate(zip(self.blocks, caches, strict=True)):
            image = keys_values[i // self.every] if i % self.every == 0 else None
            states = block(states, table, image, mask, cache)
        return self.norm(states)

    def attention(self, states: Tensor, image_tokens: Tensor) -> Tensor:
        positions = torch.arange(states.shape[1], device=states.device)
        table = rotary_table(positions, self.head_width, self.style.rope_base)
        keys_values = self.keys_values(image_tokens)
        total = states.new_zeros(())
        for i, block in enumerate(self._blocks()):
            image = None
            if i % self.every == 0:
                image = keys_values[i // self.every]
                normed = block.norm1(states)
                queries = block.norm_x(states + block.attn(normed, table, None, None, None))
                queries = by_image(queries, len(image_tokens))
                total = total + block.xattn.weights(queries, image).mean(dim=1)
            states = block(states, table, image)
        return total.view(*states.shape[:2], image_tokens.shape[1]) / len(keys_values)

    def _blocks(self) -> list[ModernBlock]:
        return cast("list[ModernBlock]", list(self.blocks))


def _next_table(x: Tensor, caches: Sequence[KVCache], head_width: int, base: float) -> Tensor:
    """The rotary table of rows x (R, t, D) that continue the texts in the caches."""
    return rotary_table(torch.arange(x.shape[1], device=x.device) + caches[0].used, head_width, base)
