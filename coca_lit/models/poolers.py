"""Poolers: from the tokens of an image to one contrastive vector, and to the tokens that the decoder attends to.

Another one is a subclass of `Pooling` under a name of its own, see `register_pooler`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from coca_lit.models.image import ImageEncoder
from coca_lit.models.init import init_attention
from coca_lit.models.inputs import Input
from coca_lit.models.layers import CrossAttention, KeysValues
from coca_lit.models.registry import POOLERS


class PoolingSizes(NamedTuple):
    """What every pooling is built from.

    Attributes:
        encoder: whose tokens it takes.
        width, queries, heads: of attentional poolers.
        text_width: of the decoder.
        captions: whether there is a decoder.
    """

    encoder: ImageEncoder
    width: int
    queries: int
    heads: int
    text_width: int
    captions: bool


class AttentionalPooler(nn.Module):
    """Learned queries that attend to a sequence of any length and return one token each: no residual, no MLP
    (CoCa, arXiv 2205.01917). The tokens pass a norm unless `norm_out` is off.
    """

    def __init__(self, context_width: int, width: int, queries: int, heads: int, norm_out: bool = True) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, width))
        self.norm_query = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(context_width)
        self.attention = CrossAttention(width, context_width, heads)
        self.norm_out = nn.LayerNorm(width) if norm_out else nn.Identity()

    def init_parameters(self) -> None:
        """Overwrites all parameters with initial values."""
        nn.init.normal_(self.query, std=1.0)
        init_attention(self.attention, out_std=self.attention.out.in_features**-0.5)
        for norm in (m for m in self.children() if isinstance(m, nn.LayerNorm)):
            norm.reset_parameters()

    def forward(self, context: Tensor, queries: slice = slice(None), mask: Tensor | None = None) -> Tensor:
        """context (B, S, C) -> (B, Q, E), for the given slice of the queries; `mask` as of `CrossAttention`."""
        return self.norm_out(self.attention(*self._inputs(context, queries), mask=mask))

    def weights(self, context: Tensor, queries: slice = slice(None), mask: Tensor | None = None) -> Tensor:
        """Attention of each query: (B, Q, S) over the context (B, S, C), the mean over heads; rows add up to 1."""
        return self.attention.weights(*self._inputs(context, queries), mask).mean(dim=1)

    def _inputs(self, context: Tensor, queries: slice) -> tuple[Tensor, KeysValues]:
        """The queries (B, Q, E), and keys and values of the context."""
        query = self.norm_query(self.query[queries]).expand(context.shape[0], -1, -1)
        return query, self.attention.keys_values(self.norm_context(context))


class Pooling(nn.Module, ABC):
    """Image tokens -> one contrastive vector and the tokens that the decoder attends to.

    A pooler of another kind is a subclass of this, registered with `register_pooler`. Its constructor takes `sizes`
    and what `pooler_args` may hold.

    Attributes:
        vector_width, token_width: of the contrastive vector and of the decoder's tokens.
        projected: whether `CoCa.image_projection` follows the vector.
        token_kind: the class of what it takes from the image encoder in place of a tensor.
        left_out: leading tokens of an image, such as a class token, that are not used.
        options: of other kinds of input, as in `CoCaConfig`; `CoCa` sets them.
        added: names of the parameters that they have added.
    """

    vector_width: int
    token_width: int
    projected = True
    token_kind: ClassVar[type[Input] | None] = None
    left_out = 0

    def __init__(self, sizes: PoolingSizes) -> None:
        super().__init__()
        self.options: Mapping[str, Any] = {}
        self.added: list[str] = []

    def add_parameter(self, name: str, *shape: int) -> None:
        """Adds a learned tensor that only another kind of input reads. It starts at zero, so that a model of images
        starts as it is.
        """
        self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.added.append(name)

    def no_weight_decay(self) -> list[str]:
        return self.added

    @abstractmethod
    def parts_of_loss(self, loss: str) -> list[str]:
        """Children that only the "contrastive" or only the "caption" loss trains."""

    @abstractmethod
    def init_parameters(self) -> None:
        """Overwrites all parameters with initial values."""

    def forward(
        self, tokens: Any, contrastive: bool = True, captioning: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """As `pool`, or what another kind of input makes of it."""
        if isinstance(tokens, Input):
            return tokens.pooled_by(self, contrastive, captioning)
        return self.pool(tokens, contrastive, captioning)

    @abstractmethod
    def pool(self, tokens: Any, contrastive: bool, captioning: bool) -> tuple[Tensor | None, Tensor | None]:
        """Tokens of the image encoder, (B, S, C) or of `token_kind`, -> contrastive vector (B, E) and decoder tokens
        (B, Q, E), None where switched off.
        """

    @abstractmethod
    def attention(self, tokens: Any) -> Tensor:
        """Where each of the decoder's tokens looks among the encoder's: (B, Q, S), rows add up to 1."""


class SinglePooling(Pooling):
    """One pooler; query 0 is the contrastive vector, the others are the decoder's tokens (OpenCLIP: 255 of 256)."""

    def __init__(self, sizes: PoolingSizes) -> None:
        super().__init__(sizes)
        if sizes.captions and sizes.queries < 2:
            raise ValueError(
                "pooler_queries must be at least 2 for the single pooler: the first is the contrastive vector"
            )
        self.vector_width = self.token_width = sizes.width
        self.generative = AttentionalPooler(sizes.encoder.width, sizes.width, sizes.queries, sizes.heads)

    def parts_of_loss(self, loss: str) -> list[str]:
        return []

    def init_parameters(self) -> None:
        self.generative.init_parameters()

    def pool(self, tokens: Tensor, contrastive: bool, captioning: bool) -> tuple[Tensor | None, Tensor | None]:
        first = 1 if contrastive else 0
        pooled = self.generative(tokens, slice(1 - first, None if captioning else 1))
        return (pooled[:, 0] if contrastive else None), (pooled[:, first:] if captioning else None)

    def attention(self, tokens: Tensor) -> Tensor:
        return self.generative.weights(tokens, slice(1, None))


class TwoPoolers(Pooling):
    """The paper's (section 3.2), each with a norm behind it. The generative one attends to the encoder's tokens; the
    contrastive one does so too (parallel), or attends to what the generative one returns (cascade).
    """

    parallel: ClassVar[bool]

    def __init__(self, sizes: PoolingSizes) -> None:
        super().__init__(sizes)
        image_width = sizes.encoder.width
        width = sizes.width
        queries = sizes.queries
        heads = sizes.heads
        self.vector_width = self.token_width = width
        self.norm = nn.Identity() if self.projected else nn.LayerNorm(image_width)
        self.generative = AttentionalPooler(image_width, width, queries, heads, self.projected)
        self.contrastive = AttentionalPooler(image_width if self.parallel else width, width, 1, heads, self.projected)

    def parts_of_loss(self, loss: str) -> list[str]:
        if loss == "contrastive":
            return ["contrastive"]
        return ["generative"] if self.parallel else []

    def init_parameters(self) -> None:
        self.generative.init_parameters()
        self.contrastive.init_parameters()

    def pool(self, tokens: Any, contrastive: bool, captioning: bool) -> tuple[Tensor | None, Tensor | None]:
        context, mask = self.context(tokens)
        image_tokens = self.generative(context, mask=mask) if captioning or not self.parallel else None
        vector = None
        if contrastive:
            vector = self.contrastive(context, mask=mask) if self.parallel else self.contrastive(image_tokens)
            vector = vector[:, 0]
        return vector, (image_tokens if captioning else None)

    def attention(self, tokens: Any) -> Tensor:
        context, mask = self.context(tokens)
        return self.generative.weights(context, mask=mask)

    def context(self, tokens: Any) -> tuple[Tensor, Tensor | None]:
        """What both poolers may attend to: image tokens (B, S, C), and a mask as of `CrossAttention`, None for all."""
        return self.norm(tokens), None


class ParallelPooling(TwoPoolers):
    parallel = True


class CascadePooling(TwoPoolers):
    parallel = False


class OpenClipPooling(TwoPoolers):
    """The two poolers of OpenCLIP 4: the image tokens are normed once, and nothing follows either pooler, neither norm
    nor projection.
    """

    projected = False

    def init_parameters(self) -> None:
        """OpenCLIP 4's values: its attention starts as `nn.MultiheadAttention` does, with queries of deviation 1.

        That layer keeps q, k and v in one matrix where they have the same input width, and Xavier's bound follows from
        the shape of what is kept.
        """
        cast(nn.LayerNorm, self.norm).reset_parameters()
        for pooler in (self.generative, self.contrastive):
            nn.init.normal_(pooler.query, std=1.0)
            attention = pooler.attention
            width = attention.q.in_features
            context_width = attention.kv.in_features
            rows = 3 * width if width == context_width else width
            for linear in (attention.q, attention.kv):
                bound = (6 / (rows + linear.in_features)) ** 0.5
                nn.init.uniform_(linear.weight, -bound, bound)
            attention.out.reset_parameters()
            for linear in (attention.q, attention.kv, attention.out):
                nn.init.zeros_(linear.bias)
            for norm in (pooler.norm_query, pooler.norm_context):
                norm.reset_parameters()


class OpenClipParallelPooling(OpenClipPooling):
    parallel = True


class OpenClipCascadePooling(OpenClipPooling):
    parallel = False


def build_pooling(name: str, sizes: PoolingSizes, **arguments: Any) -> Pooling:
    """The pooling of this name; raises `ValueError` if there is none, or if it does not go with the image encoder."""
    pooling = cast(Pooling, POOLERS.build(name, {"sizes": sizes}, arguments))
    encoder = sizes.encoder
    if pooling.token_kind is encoder.token_kind:
        return pooling
    encoder_name = type(encoder).__name__
    if encoder.token_kind is None:
        raise ValueError(f"the pooler {name} belongs to another image encoder than {encoder_name}: set another one")
    fitting = " or ".join(encoder.token_kind.poolers)
    raise ValueError(f"the image encoder {encoder_name} needs the pooler {fitting}, got {name}")
