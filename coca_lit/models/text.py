"""The text side of CoCa: a causal unimodal tower that ends in a CLS token, and the multimodal decoder above it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.errors import check_number
from coca_lit.models import kernels
from coca_lit.models.config import ClsMask
from coca_lit.models.init import init_blocks, init_projection
from coca_lit.models.layers import CrossBlock, KeysValues, SelfBlock, by_image, normalize_once
from coca_lit.models.packing import KVCache, Layout, to_device
from coca_lit.models.registry import TEXT_TOWERS, build_from
from coca_lit.models.trainable import GradCheckpointing, run


@dataclass(frozen=True)
class TextSizes:
    """What every text tower, and the decoder above it, is built from.

    Attributes:
        context_length: tokens of a text at most, start and end included.
        width, heads, dropout: of the tower and the decoder.
        layers: of the tower.
        embed_dim: width of the common space.
        cls_mask: of the CLS token, see `TextTower`; a tower without one ignores it.
    """

    vocab_size: int
    context_length: int
    width: int
    layers: int
    heads: int
    embed_dim: int
    cls_mask: ClsMask
    dropout: float


class Tower(nn.Module, ABC):
    """Token ids -> a state per token for the decoder, and a text feature.

    A text tower of another kind, see `register_text_tower`, is a subclass of this or of `TextTower`. It brings its
    decoder, see `make_decoder`.

    Attributes:
        blocks: its transformer blocks.
        most_rows: rows of the longest text in a layout, CLS included.
        grad_checkpointing: what the backward pass computes again.
    """

    blocks: nn.ModuleList
    embeddings: ClassVar[Sequence[str]] = ("token_embedding.weight",)  # the parameters below all blocks
    grad_checkpointing: GradCheckpointing = "none"
    pad_id = 0  # `CoCa` sets its tokenizer's

    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        self.context_length = self.most_rows = sizes.context_length
        self.token_embedding = nn.Embedding(sizes.vocab_size, sizes.width)
        self.dropout = nn.Dropout(sizes.dropout)

    @abstractmethod
    def make_decoder(self, sizes: TextSizes, image_width: int, layers: int, **arguments: Any) -> "Decoder":
        """The decoder that reads the states of this tower, and image tokens of the given width. A tower with a decoder
        of its own overrides this method: it goes with the name of the tower.

        Args:
            layers: of the decoder.
            arguments: the user's `decoder_args`; `build_from` checks them against the signature of a class.
        """

    @abstractmethod
    def init_parameters(self) -> None:
        """Overwrites all parameters with initial values."""

    @abstractmethod
    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor,
        contrastive: bool = True,
        packed: bool | None = None,
        max_length: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Layout]:
        """Token states, and if `contrastive` the text features (B, E) before normalisation.

        Args:
            tokens: (B, T) ids, padded at the end to any T.
            lengths: (B,) number of real tokens; on the host, else they are copied there, which waits for the device.
            packed, max_length: see `Layout`; of the rows of a text, CLS included.

        Returns:
            The states in the layout that is the third value: rows 0 … lengths - 1 of a text are its tokens; the decoder
            must not read those after them.
        """

    @abstractmethod
    def step(self, tokens: Tensor, caches: Sequence[KVCache], mask: Tensor | None = None) -> Tensor:
        """States (R, t, D) of the next tokens (R, t) of texts whose beginnings are in the caches, one per block."""

    @property
    def cached_layers(self) -> int:
        """How many layers remember keys and values during generation."""
        return len(self.blocks)

    @property
    def contrastive_only(self) -> Sequence[str]:
        """The parts that captioning does not use."""
        return ("projection",)

    def depths(self) -> dict[str, int]:
        """{parameter: layers from the top}: 1 in the last block, one more in each before it, the embeddings deepest.
        Norm and projection stand on the tower.
        """
        depths = dict.fromkeys(self.embeddings, len(self.blocks) + 1)
        for i, block in enumerate(self.blocks):
            depths |= {f"blocks.{i}.{name}": len(self.blocks) - i for name, _ in block.named_parameters()}
        return depths


class TextTower(Tower):
    """CoCa's own: causal, and a CLS token after the caption.

    CLS stands right after its text and always takes the last position embedding (row `context_length`), as if it
    stood after all padding. `cls_mask` says what it sees: "correct", the caption and itself; "legacy", what OpenCLIP's
    off-by-one mask lets it see: the caption and the first pad, and itself only if the caption fills the context. The
    released OpenCLIP weights were trained with the latter.
    """

    contrastive_only = ("cls_embedding", "norm", "projection")
    embeddings = ("token_embedding.weight", "position_embedding", "cls_embedding")

    def __init__(self, sizes: TextSizes) -> None:
        super().__init__(sizes)
        width = sizes.width
        self.most_rows = sizes.context_length + 1
        self.cls_mask = sizes.cls_mask
        self.position_embedding = nn.Parameter(torch.empty(sizes.context_length + 1, width))
        self.cls_embedding = nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(SelfBlock(width, sizes.heads, sizes.dropout) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(width)  # of the CLS state only; the decoder takes token states as they are
        self.projection = nn.Linear(width, sizes.embed_dim, bias=False)

    def init_parameters(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)
        nn.init.normal_(self.cls_embedding, std=0.01)
        self.norm.reset_parameters()
        init_projection(self.projection)
        init_blocks(self.blocks, depth=len(self.blocks))

    def make_decoder(self, sizes: TextSizes, image_width: int, layers: int, **arguments: Any) -> "ClassicDecoder":
        given = {"sizes": sizes, "image_width": image_width, "layers": layers}
        return build_from(ClassicDecoder, "decoder_args", given, arguments)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor,
        contrastive: bool = True,
        packed: bool | None = None,
        max_length: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Layout]:
        lengths = lengths.cpu()
        cls_at = self._cls_positions(lengths)  # (B,)
        rows = cls_at + 1 if contrastive else cls_at
        layout = Layout(rows, packed, max_length, tokens.device)
        added = layout.max_length - tokens.shape[1]  # a negative padding cuts
        tokens = layout.pack(F.pad(tokens, (0, added), value=self.pad_id))  # (B, L), or (N,) packed
        positions = layout.positions.expand(lengths.shape[0], -1)  # (B, L)
        if not contrastive:
            x = self._embed(tokens, layout.pack_to_device(positions))
            return self._blocks(x, None, layout), None, layout
        is_cls = positions == cls_at[:, None]  # (B, L)
        positions = positions.where(~is_cls, self.context_length)
        x = self._embed(tokens, layout.pack_to_device(positions), layout.pack_to_device(is_cls))
        x = self._blocks(x, self._mask(is_cls, lengths, layout.device), layout)
        features = self.projection(self.norm(layout.gather_at(x, cls_at)))
        return x, features, layout

    def _cls_positions(self, lengths: Tensor) -> Tensor:
        """Where CLS stands behind texts of these lengths (B,). Only a legacy CLS sees what stands at the first pad."""
        return lengths if self.cls_mask == "correct" else (lengths + 1).clamp(max=self.context_length)

    def _mask(self, is_cls: Tensor, lengths: Tensor, device: torch.device) -> Tensor | None:
        """The attention mask on the device, see `legacy_attention_mask`; None for a causal one."""
        if self.cls_mask == "correct":
            return None
        fills_context = lengths == self.context_length
        return legacy_attention_mask(to_device(is_cls, device), to_device(fills_context, device))

    def _blocks(self, x: Tensor, mask: Tensor | None, layout: Layout) -> Tensor:
        recompute = self.training and self.grad_checkpointing == "blocks"
        for block in self.blocks:
            x = run(block, x, mask, None, layout, recompute=recompute)
        return x

    def step(self, tokens: Tensor, caches: Sequence[KVCache], mask: Tensor | None = None) -> Tensor:
        x = self._embed(tokens, torch.arange(tokens.shape[1], device=tokens.device) + caches[0].used)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, mask, cache)
        return x

    def _embed(self, tokens: Tensor, positions: Tensor, is_cls: Tensor | None = None) -> Tensor:
        x = self.token_embedding(tokens)
        if is_cls is not None:
            x = torch.where(is_cls[..., None], self.cls_embedding, x)
        # Not an index: on several threads the gradient of that adds in no fixed order.
        return self.dropout(x + F.embedding(positions, self.position_embedding))


def build_text_tower(name: str | None, sizes: TextSizes, **arguments: Any) -> Tower:
    """The registered tower called `name`, or a `TextTower` if it is None."""
    if name is not None:
        return cast(Tower, TEXT_TOWERS.build(name, {"sizes": sizes}, arguments))
    if arguments:
        raise ValueError(f"text_tower_args need a text_tower: got {arguments}")
    return TextTower(sizes)


def legacy_attention_mask(is_cls: Tensor, fills_context: Tensor) -> Tensor:
    """Boolean mask (B, 1, L, L), True where a query (row) may attend: causal, but a CLS row does not see itself unless
    its caption fills the context.

    Args:
        is_cls: (B, L), True at the CLS of each text.
        fills_context: (B,)
    """
    causal = torch.ones(is_cls.shape[1], is_cls.shape[1], dtype=torch.bool, device=is_cls.device).tril()  # (L, L)
    return (causal & ~torch.diag_embed(is_cls & ~fills_context[:, None]))[:, None]


class Decoder(nn.Module, ABC):
    """What turns the states of a text tower and image tokens into hidden states that predict the next token.

    Attributes:
        vocabulary: the projection of hidden states to logits.
        grad_checkpointing: what the backward pass computes again.
    """

    vocabulary: kernels.Linear
    grad_checkpointing: GradCheckpointing = "none"

    @property
    @abstractmethod
    def cached_layers(self) -> int:
        """How many layers remember keys and values during generation."""

    @abstractmethod
    def layers(self) -> list[list[nn.Module]]:
        """The modules of each layer. Sharding gathers them together, as keys and values of the image are computed
        before a cross block is called.
        """

    @abstractmethod
    def init_parameters(self, tied: bool = False) -> None:
        """Overwrites all parameters with initial values.

        Args:
            tied: the vocabulary projection is the token embedding, and initialised with it.
        """

    @abstractmethod
    def keys_values(self, image_tokens: Tensor) -> list[KeysValues]:
        """Keys and values of the image tokens (B, S, E) for every layer: all that generation needs of an image.

        They are contiguous, because every step reads them: a quarter less time in that attention for one copy.
        """

    def keys_values_of_graph(self, image_tokens: Tensor) -> list[KeysValues]:
        """`keys_values` as a recorded graph computes them: what depends on weights alone is not computed again at every
        call.
        """
        return self.keys_values(image_tokens)

    @abstractmethod
    def forward(self, states: Tensor, image_tokens: Tensor | None, layout: Layout | None = None) -> Tensor:
        """Token states (B, T, D), or packed as `layout` says, and image tokens (B, S, E) -> hidden states of the same
        shape as the token states, ready for `vocabulary`. Without image tokens cross-attention is skipped.
        """

    @abstractmethod
    def step(
        self, states: Tensor, keys_values: list[KeysValues], caches: Sequence[KVCache], mask: Tensor | None = None
    ) -> Tensor:
        """Hidden states (R, t, D) of the next token states (R, t, D). There may be several rows for each of B images,
        side by side.
        """

    @abstractmethod
    def attention(self, states: Tensor, image_tokens: Tensor) -> Tensor:
        """Where each position looks: weights (R, T, S) over the image tokens (B, S, E), the mean over layers and
        heads; rows add up to 1.
        """

    def caption_states(
        self,
        states: Tensor,
        text: Layout,
        tokens: Tensor,
        lengths: Tensor,
        image_tokens: Tensor | None,
        prefix_lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (N, D) that predict a real token, and that token (N,), caption after caption.

        The last token of each caption predicts nothing, and tokens of the prefix are not predicted.

        Args:
            states, text: of the text tower, and their layout.
            tokens: (B, T) ids.
            lengths, prefix_lengths: (B,) tokens of each text, and those that are not predicted; None for the start. On
                the host.
            image_tokens: (B, S, E), or None for texts alone.
        """
        layout = Layout(lengths - 1, text.packed, device=tokens.device)
        if text.packed:
            states = text.compact(states, text.positions < lengths[:, None] - 1)
        else:
            states = states[:, : layout.max_length]
        hidden = self(states, image_tokens, layout)  # packed, or (B, T - 1, D)
        predicted = layout.mask  # (B, T - 1)
        if prefix_lengths is not None:
            predicted = predicted & (layout.positions >= prefix_lengths[:, None] - 1)
        is_label = F.pad(predicted, (1, tokens.shape[1] - layout.max_length - 1))  # (B, T)
        labels = to_device(is_label.flatten().nonzero().squeeze(1), tokens.device)  # (N,), their places
        return layout.compact(hidden, predicted), tokens.flatten()[labels]


def expect_decoder(decoder: Decoder | None) -> Decoder:
    """The decoder of a model; raises ValueError if it has none."""
    if decoder is None:
        raise ValueError("this model has no decoder (decoder_layers=0)")
    return decoder


class CrossDecoder(Decoder):
    """Causal self blocks, each followed by a cross block over the image tokens or by none, then a norm.

    Attributes:
        self_blocks, norm: which may belong to the text tower.
    """

    self_blocks: nn.ModuleList
    cross_blocks: nn.ModuleList
    norm: nn.LayerNorm

    def blocks(self) -> list[tuple[SelfBlock, CrossBlock | None]]:
        """The self blocks, each with the cross block that follows it, if one does. By default one follows each."""
        pairs: Any = zip(self.self_blocks, self.cross_blocks, strict=True)
        return list(pairs)

    @property
    def cached_layers(self) -> int:
        return len(self.self_blocks)

    def keys_values(self, image_tokens: Tensor) -> list[KeysValues]:
        normed = normalize_once(image_tokens)
        pairs = (block.keys_values(normed) for block in cast("list[CrossBlock]", self.cross_blocks))
        return [(keys.contiguous(), values.contiguous()) for keys, values in pairs]

    def keys_values_of_graph(self, image_tokens: Tensor) -> list[KeysValues]:
        blocks = cast("list[CrossBlock]", self.cross_blocks)
        return [block.attention.keys_values(block.norm_context(image_tokens)) for block in blocks]

    def forward(self, states: Tensor, image_tokens: Tensor | None, layout: Layout | None = None) -> Tensor:
        image = None if image_tokens is None else normalize_once(image_tokens)
        recompute = self.grad_checkpointing if self.training else "none"
        for self_block, cross_block in self.blocks():
            states = run(self_block, states, None, None, layout, recompute=recompute == "blocks")
            if image is not None and cross_block is not None:
                states = run(cross_block, states, image, layout, recompute=recompute != "none")
        return self.norm(states)

    def step(
        self, states: Tensor, keys_values: list[KeysValues], caches: Sequence[KVCache], mask: Tensor | None = None
    ) -> Tensor:
        images = keys_values[0][0].shape[0]
        remaining = iter(keys_values)
        for (self_block, cross_block), cache in zip(self.blocks(), caches, strict=True):
            states = self_block(states, mask, cache)
            if cross_block is not None:
                states = cross_block(by_image(states, images), next(remaining)).view_as(states)
        return self.norm(states)

    def attention(self, states: Tensor, image_tokens: Tensor) -> Tensor:
        total = states.new_zeros(())
        keys_values = iter(self.keys_values(image_tokens))
        for self_block, cross_block in self.blocks():
            states = self_block(states)
            if cross_block is not None:
                queries = by_image(states, len(image_tokens))
                image = next(keys_values)
                total = total + cross_block.weights(queries, image).mean(dim=1)  # (B, R / B · T, S)
                states = cross_block(queries, image).view_as(states)
        return total.view(*states.shape[:2], image_tokens.shape[1]) / len(self.cross_blocks)


class ClassicDecoder(CrossDecoder):
    """CoCa's own: as many cross blocks as self blocks, then the vocabulary projection.

    Args:
        init_depth: layers that the initial values count, see `init_blocks`; None for self and cross blocks together.
    """

    def __init__(self, sizes: TextSizes, image_width: int, layers: int, init_depth: int | None = None) -> None:
        super().__init__()
        if init_depth is not None:
            check_number("init_depth", init_depth, whole=True, at_least=1)
        self._init_depth = init_depth or 2 * layers
        width = sizes.width
        heads = sizes.heads
        dropout = sizes.dropout
        self.self_blocks = nn.ModuleList(SelfBlock(width, heads, dropout) for _ in range(layers))
        self.cross_blocks = nn.ModuleList(CrossBlock(width, image_width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.vocabulary = kernels.Linear(width, sizes.vocab_size, bias=False)

    def layers(self) -> list[list[nn.Module]]:
        return [list(pair) for pair in zip(self.self_blocks, self.cross_blocks, strict=True)]

    def init_parameters(self, tied: bool = False) -> None:
        init_blocks(self.self_blocks, self._init_depth)
        init_blocks(self.cross_blocks, self._init_depth)
        self.norm.reset_parameters()
        if not tied:
            init_projection(self.vocabulary)
