"""MaMMUT (arXiv 2303.16839): the text tower is its own decoder, which reads a text twice.

contrastive pass: embedded tokens ─ self blocks, every token sees all of its text ─ norm ─ mean ─ text feature
caption pass:     embedded tokens ─ causal self blocks, after every n-th a cross block ─ norm ─ vocabulary

The self blocks and the norm belong to the tower and are trained by both losses; cross blocks and vocabulary belong to
the decoder. The image side is in `pooling`: the decoder attends to all patches, the image feature is their mean.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.errors import check_number
from coca_lit.models import kernels
from coca_lit.models.init import init_attention, init_blocks, init_projection
from coca_lit.models.layers import CrossBlock, KeysValues, SelfAttention, SelfBlock
from coca_lit.models.packing import KVCache, Layout, to_device
from coca_lit.models.registry import build_from
from coca_lit.models.text import CrossDecoder, TextSizes, Tower
from coca_lit.models.trainable import run


class AttentionBlock(nn.Module):
    """x + attention(norm(x)): a `SelfBlock` without its MLP."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.dropout = nn.Dropout(dropout)

    def init_parameters(self, depth: int) -> None:
        """The values of a `SelfBlock` in a tower of `depth` blocks."""
        width = self.norm_1.normalized_shape[0]
        init_attention(self.attention, out_std=width**-0.5 * (2 * depth) ** -0.5)
        self.norm_1.reset_parameters()

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, layout: Layout | None = None
    ) -> Tensor:
        return x + self.dropout(self.attention(self.norm_1(x), mask, cache, layout))


class TwoPassTower(Tower):
    """MaMMUT's text tower. It has no projection: the mean state is the text feature.

    Args:
        attention_only_every: n; blocks 0, n, 2n … have no MLP, as in LAION's smaller MaMMUTs those that a cross block
            follows. None: all blocks have one.
    """

    contrastive_only = ()
    embeddings = ("token_embedding.weight", "position_embedding")
    cached_layers = 0  # only the decoder's layers are cached
    pad_mask = True

    def __init__(self, sizes: TextSizes, attention_only_every: int | None = None) -> None:
        super().__init__(sizes)
        width = sizes.width
        if attention_only_every is not None:
            check_number("attention_only_every", attention_only_every, whole=True, at_least=1)
        if sizes.embed_dim != width:
            raise ValueError(
                f"a two-pass text tower has no projection: text_width ({width}) must be embed_dim ({sizes.embed_dim})"
            )
        self.position_embedding = nn.Parameter(torch.empty(sizes.context_length, width))
        self.blocks = nn.ModuleList()
        for i in range(sizes.layers):
            without_mlp = attention_only_every is not None and i % attention_only_every == 0
            kind = AttentionBlock if without_mlp else SelfBlock
            self.blocks.append(kind(width, sizes.heads, sizes.dropout))
        self.norm = nn.LayerNorm(width)

    def make_decoder(self, sizes: TextSizes, image_width: int, layers: int, **arguments: Any) -> "TwoPassDecoder":
        if layers != len(self.blocks):
            raise ValueError(f"decoder_layers must be the {len(self.blocks)} of a two-pass text tower, got {layers}")
        given = {"tower": self, "sizes": sizes, "image_width": image_width}
        return build_from(TwoPassDecoder, "decoder_args", given, arguments)

    def init_parameters(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)
        self.norm.reset_parameters()
        for block in self.blocks:
            if isinstance(block, AttentionBlock):
                block.init_parameters(depth=len(self.blocks))
            else:
                init_blocks([block], depth=len(self.blocks))

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor,
        contrastive: bool = True,
        packed: bool | None = None,
        max_length: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Layout]:
        """The states are embedded tokens, with which the caption pass begins."""
        lengths = lengths.cpu()
        layout = Layout(lengths, packed, max_length, tokens.device)
        features = None
        if contrastive:
            seen = layout  # of the positions that are read and averaged
            if not self.pad_mask:
                whole_context = torch.full_like(lengths, self.context_length)
                seen = Layout(whole_context, False, self.context_length, tokens.device)
            x = self._embed(tokens, seen)
            seen_mask = to_device(seen.mask, tokens.device)  # (B, T)
            mask = seen_mask[:, None, None]  # (B, 1, 1, T)
            recompute = self.training and self.grad_checkpointing == "blocks"
            for block in self.blocks:
                x = run(block, x, mask, None, seen, recompute=recompute)
            grid = seen.unpack(self.norm(x))  # (B, T, D)
            features = (grid * seen_mask[..., None]).sum(dim=1) / seen_mask.sum(dim=1, keepdim=True)
        return self._embed(tokens, layout), features, layout

    def step(self, tokens: Tensor, caches: Sequence[KVCache], mask: Tensor | None = None) -> Tensor:
        return self.token_embedding(tokens)  # the decoder knows their positions

    def _embed(self, tokens: Tensor, layout: Layout) -> Tensor:
        added = layout.max_length - tokens.shape[1]  # a negative padding cuts
        tokens = F.pad(tokens, (0, added), value=self.pad_id)  # (B, T)
        # Not an index: on several threads the gradient of that adds in no fixed order.
        positions = F.embedding(layout.row_positions(), self.position_embedding)
        return self.dropout(self.token_embedding(layout.pack(tokens)) + positions)


class TwoPassTowerWithPads(TwoPassTower):
    """The released openMaMMUT's: its contrastive pass reads and averages all positions of the context, the pads
    after the text included.
    """

    pad_mask = False


class TwoPassDecoder(CrossDecoder):
    """The caption pass: the blocks of the tower, and a cross block after every n-th of them.

    Args:
        tower: whose blocks, norm and positions it uses; they stay the tower's own.
        cross_attention_every: n; blocks 0, n, 2n … are followed by a cross block.
    """

    def __init__(self, tower: TwoPassTower, sizes: TextSizes, image_width: int, cross_attention_every: int = 2) -> None:
        super().__init__()
        check_number("cross_attention_every", cross_attention_every, whole=True, at_least=1)
        self._shared = (tower,)  # a tuple: as an attribute, its tensors would be the decoder's as well
        width, heads, dropout = sizes.width, sizes.heads, sizes.dropout
        self.every = cross_attention_every
        count = len(range(0, len(tower.blocks), self.every))
        self.cross_blocks = nn.ModuleList(CrossBlock(width, image_width, heads, dropout) for _ in range(count))
        self.vocabulary = kernels.Linear(width, sizes.vocab_size, bias=False)

    @property
    def tower(self) -> TwoPassTower:
        return self._shared[0]

    @property
    def self_blocks(self) -> nn.ModuleList:  # type: ignore[override]
        return self.tower.blocks

    def blocks(self) -> list[tuple[SelfBlock, CrossBlock | None]]:
        pairs: list[Any] = []
        for i, block in enumerate(self.self_blocks):
            crossed = i % self.every == 0
            pairs.append((block, self.cross_blocks[i // self.every] if crossed else None))
        return pairs

    @property
    def norm(self) -> nn.LayerNorm:  # type: ignore[override]
        return self.tower.norm

    def layers(self) -> list[list[nn.Module]]:
        return [[block] for block in self.cross_blocks]

    def init_parameters(self, tied: bool = False) -> None:
        init_blocks(self.cross_blocks, depth=len(self.tower.blocks))
        if not tied:
            init_projection(self.vocabulary)

    def step(
        self, states: Tensor, keys_values: list[KeysValues], caches: Sequence[KVCache], mask: Tensor | None = None
    ) -> Tensor:
        positions = torch.arange(states.shape[1], device=states.device) + caches[0].used
        states = states + F.embedding(positions, self.tower.position_embedding)
        return super().step(states, keys_values, caches, mask)
