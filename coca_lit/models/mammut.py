"""MaMMUT (arXiv 2303.16839): the text tower is its own decoder, which reads a text twice.

contrastive pass: embedded tokens ─ self blocks, every token sees all of its text ─ norm ─ mean ─ text feature
caption pass:     embedded tokens ─ causal self blocks, after every n-th a cross block ─ norm ─ vocabulary

The self blocks and the norm belong to the tower and are trained by both losses; cross blocks and vocabulary belong to
the decoder. The image side pools nothing: the decoder attends to all patches, the image feature is their mean.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.errors import check_names, check_number
from coca_lit.models import kernels
from coca_lit.models.init import init_blocks, init_normal, init_projection
from coca_lit.models.layers import (
    Cache,
    CrossBlock,
    KeysValues,
    OpenClipNames,
    SelfBlock,
    by_image,
    layers_from_the_top,
    normalize_once,
)
from coca_lit.models.packing import Layout, to_device
from coca_lit.models.text import ClsMask, Decoder, GradCheckpointing, keys_values_of, run


class TwoPassTower(nn.Module):
    """MaMMUT's text tower. It has no projection: the mean state is the text feature."""

    contrastive_only: Sequence[str] = ()
    cached_layers = 0  # only the decoder's layers are cached
    open_clip_version = "4"
    open_clip_config: ClassVar[dict[str, Any]] = {}  # it has none besides its decoder's
    open_clip_names: ClassVar[OpenClipNames] = (
        ("blocks.", "text.resblocks.", SelfBlock.open_clip_names),
        ("position_embedding", "text.positional_embedding", {}),
        ("norm.", "text.ln_final.", {}),
        ("token_embedding.", "text.token_embedding.", {}),
    )
    pad_id = 0  # `CoCa` sets its tokenizer's
    pad_mask = True

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        cls_mask: ClsMask,
        dropout: float,
    ) -> None:
        super().__init__()
        if embed_dim != width:
            raise ValueError(
                f"a two-pass text tower has no projection: text_width ({width}) must be embed_dim ({embed_dim})"
            )
        self.context_length = self.most_rows = context_length
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(context_length, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(SelfBlock(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.grad_checkpointing: GradCheckpointing = "none"

    def make_decoder(
        self, image_width: int, layers: int, heads: int, dropout: float, **arguments: Any
    ) -> "TwoPassDecoder":
        if layers != len(self.blocks):
            raise ValueError(
                f"the decoder of a two-pass text tower has its layers: decoder_layers must be {len(self.blocks)},"
                f" got {layers}"
            )
        check_names("decoder_args", arguments, ["cross_attention_every"])
        return TwoPassDecoder(self, image_width, heads, dropout, **arguments)

    def init_parameters(self) -> None:
        init_normal(self.token_embedding.weight, 0.02)
        init_normal(self.position_embedding, 0.01)
        self.norm.reset_parameters()
        init_blocks(self.blocks, depth=len(self.blocks))

    def depths(self) -> dict[str, int]:
        """{parameter: layers from the top}, as of `TextTower`."""
        return layers_from_the_top(self.blocks, "token_embedding.weight", "position_embedding")

    def contrastive_layout(
        self, lengths: Tensor, packed: bool | None, max_length: int | None, device: torch.device
    ) -> Layout:
        """The positions that the contrastive pass reads and averages: the tokens of each text (B,)."""
        return Layout(lengths, packed, max_length, device)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor,
        contrastive: bool = True,
        packed: bool | None = None,
        max_length: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Layout]:
        """Embedded tokens, with which the caption pass begins, and if `contrastive` the text features (B, E) before
        normalisation; arguments and layout as of `TextTower`.
        """
        lengths = lengths.cpu()
        layout = Layout(lengths, packed, max_length, tokens.device)
        features = None
        if contrastive:
            seen = self.contrastive_layout(lengths, packed, max_length, tokens.device)
            x = self._embed(tokens, seen)
            seen_mask = to_device(seen.mask, tokens.device)  # (B, T)
            mask = seen_mask[:, None, None]  # (B, 1, 1, T)
            for block in self.blocks:
                x = run(block, x, mask, None, seen, recompute=self.training and self.grad_checkpointing == "blocks")
            grid = seen.unpack(self.norm(x))  # (B, T, D)
            features = (grid * seen_mask[..., None]).sum(dim=1) / seen_mask.sum(dim=1, keepdim=True)
        return self._embed(tokens, layout), features, layout

    def step(self, tokens: Tensor, caches: Sequence[Cache], mask: Tensor | None = None) -> Tensor:
        """Tokens (R, t) embedded without their positions, which the decoder knows: (R, t, D)."""
        return self.token_embedding(tokens)

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

    def contrastive_layout(
        self, lengths: Tensor, packed: bool | None, max_length: int | None, device: torch.device
    ) -> Layout:
        return Layout(torch.full_like(lengths, self.context_length), False, self.context_length, device)


class TwoPassDecoder(Decoder):
    """The caption pass: the blocks of the tower, and a cross block after every n-th of them.

    Args:
        tower: whose blocks, norm and positions it uses; they stay the tower's own.
        cross_attention_every: n; blocks 0, n, 2n … are followed by a cross block.
    """

    open_clip_names: ClassVar[OpenClipNames] = (
        ("cross_blocks.", "text.cross_attn.", CrossBlock.open_clip_names),
        ("vocabulary.weight", "text.lm_head", {}),
    )

    def __init__(
        self, tower: TwoPassTower, image_width: int, heads: int, dropout: float, cross_attention_every: int = 2
    ) -> None:
        super().__init__()
        check_number("cross_attention_every", cross_attention_every, whole=True, at_least=1)
        self._shared = (tower,)  # a tuple: as an attribute, its tensors would be the decoder's as well
        vocab_size, width = tower.token_embedding.weight.shape
        self.every = cross_attention_every
        count = len(range(0, len(tower.blocks), self.every))
        self.cross_blocks = nn.ModuleList(CrossBlock(width, image_width, heads, dropout) for _ in range(count))
        self.vocabulary = kernels.Linear(width, vocab_size, bias=False)

    @property
    def tower(self) -> TwoPassTower:
        return self._shared[0]

    @property
    def open_clip_config(self) -> dict[str, Any]:
        return {
            "cross_attn_ratio": self.every,
            "pool_type": "avg",
            "use_pad_mask": self.tower.pad_mask,
            "proj_type": "none",
        }

    @property
    def cached_layers(self) -> int:
        return len(self.tower.blocks)

    def layers(self) -> list[list[nn.Module]]:
        return [[block] for block in self.cross_blocks]

    def init_parameters(self, tied: bool = False) -> None:
        init_blocks(self.cross_blocks, depth=len(self.tower.blocks))
        if not tied:
            init_projection(self.vocabulary)

    def keys_values(self, image_tokens: Tensor) -> list[KeysValues]:
        return keys_values_of(cast("list[CrossBlock]", self.cross_blocks), image_tokens)

    def forward(self, states: Tensor, image_tokens: Tensor | None, layout: Layout | None = None) -> Tensor:
        image = None if image_tokens is None else normalize_once(image_tokens)
        recompute = self.grad_checkpointing if self.training else "none"
        for i, self_block in enumerate(self.tower.blocks):
            states = run(self_block, states, None, None, layout, recompute=recompute == "blocks")
            if image is not None and i % self.every == 0:
                states = run(self.cross_blocks[i // self.every], states, image, layout, recompute=recompute != "none")
        return self.tower.norm(states)

    def step(
        self, states: Tensor, keys_values: list[KeysValues], caches: Sequence[Cache], mask: Tensor | None = None
    ) -> Tensor:
        positions = torch.arange(states.shape[1], device=states.device) + caches[0].used
        states = states + F.embedding(positions, self.tower.position_embedding)
        images = keys_values[0][0].shape[0]
        for i, (self_block, cache) in enumerate(zip(self.tower.blocks, caches, strict=True)):
            states = self_block(states, mask, cache)
            if i % self.every == 0:
                cross_block, image = self.cross_blocks[i // self.every], keys_values[i // self.every]
                states = cross_block(by_image(states, images), image).view_as(states)
        return self.tower.norm(states)

    def attention(self, states: Tensor, image_tokens: Tensor) -> Tensor:
        image, total = self.keys_values(image_tokens), states.new_zeros(())
        for i, self_block in enumerate(self.tower.blocks):
            states = self_block(states)
            if i % self.every == 0:
                cross_block, pair = cast(CrossBlock, self.cross_blocks[i // self.every]), image[i // self.every]
                queries = by_image(states, len(image_tokens))
                total = total + cross_block.weights(queries, pair).mean(dim=1)
                states = cross_block(queries, pair).view_as(states)
        return total.view(*states.shape[:2], image_tokens.shape[1]) / len(image)
