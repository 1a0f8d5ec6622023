"""CoCa: one network that embeds images and texts in a common space and captions images (arXiv 2205.01917).

images ─ ImageEncoder ─ ImagePooling ─┬─ contrastive vector ─ projection ─ image features ─┐
                                      └─ image tokens ──────────────┐                      ├─ contrastive loss
tokens ─ TextTower ───────────────────┬─ CLS ─ projection ─ text features ─────────────────┘
                                      └─ token states ─ Decoder ────┴─ next-token logits ──── caption loss
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, Unpack, get_args, overload

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from coca_lit.models.generation.beam import Scoring
from coca_lit.models.generation.generate import Captions, generate
from coca_lit.models.generation.options import GenerateArguments, Options, Rerank, Strategy
from coca_lit.models.generation.static import Step, static_step
from coca_lit.models.image import ImageEncoder, ImagePooling, Pooler
from coca_lit.models.init import init_parameters
from coca_lit.models.layers import CrossBlock, SelfBlock
from coca_lit.models.packing import Layout
from coca_lit.models.text import ClsMask, Decoder, GradCheckpointing, TextTower
from coca_lit.tokenizer import get_tokenizer

Contrastive = Literal["softmax", "siglip"]

IGNORED_LABEL = -100
MAX_LOGIT_SCALE = 4.605170185988092  # ln 100, the bound that CLIP puts on the temperature


class CoCaOutput(NamedTuple):
    """What the two losses need. N is the number of predicted tokens in the batch: each caption's tokens after the
    start token, without padding.
    """

    image_features: Tensor | None  # (B, E), unit length
    text_features: Tensor | None  # (B, E), unit length
    logit_scale: Tensor  # (1,), exp of the learned temperature
    hidden: Tensor | None  # (N, D), decoder states before the vocabulary projection, caption after caption
    labels: Tensor | None  # (N,), the token that follows each of them
    vocabulary: Tensor | None  # (V, D), weight of the vocabulary projection
    logit_bias: Tensor | None  # (1,), of a model with contrastive="siglip"

    @property
    def logits(self) -> Tensor:
        """Next-token logits (N, V). The training loss works from `hidden` and need not hold them all."""
        if self.hidden is None or self.vocabulary is None:
            raise ValueError(
                "this output has no caption logits: the model has no decoder, or captioning was switched off"
            )
        return F.linear(self.hidden, self.vocabulary)


class CoCa(nn.Module):
    """Contrastive captioner.

    Args:
        image_encoder: name of a timm model; `image_encoder_args` are handed to it (depth, embed_dim, …; for a vision
            transformer `patch_drop_rate`, the share of patches that each training step leaves out).
        image_size: side of the square input in pixels.
        embed_dim: width of the common space and of the image tokens.
        pooler: single | parallel | cascade, see `ImagePooling`.
        pooler_queries: learned queries of the (generative) pooler.
        tokenizer: name or word list for `get_tokenizer`; vocabulary, context length and special ids come from it.
        cls_mask: correct | legacy, see `TextTower`.
        decoder_layers: pairs of self and cross blocks; 0 builds a CLIP with the same towers and no captioner.
        dropout: in the text tower and the decoder, while training.
        contrastive: softmax (CLIP), or siglip, whose loss needs a learned bias beside the temperature.
        tied_embeddings: whether the vocabulary projection is the token embedding (Press and Wolf 2017).
    """

    def __init__(
        self,
        *,
        image_encoder: str = "vit_base_patch32_clip_224",
        image_encoder_args: dict[str, Any] | None = None,
        image_size: int = 224,
        embed_dim: int = 512,
        pooler: Pooler = "single",
        pooler_queries: int = 256,
        pooler_heads: int = 8,
        tokenizer: str | Sequence[str] = "clip",
        context_length: int = 76,
        cls_mask: ClsMask = "correct",
        text_width: int = 512,
        text_layers: int = 12,
        text_heads: int = 8,
        decoder_layers: int = 12,
        dropout: float = 0.0,
        contrastive: Contrastive = "softmax",
        tied_embeddings: bool = False,
    ) -> None:
        super().__init__()
        if contrastive not in ("softmax", "siglip"):
            raise ValueError(f"contrastive must be 'softmax' or 'siglip', got '{contrastive}'")
        self.tokenizer = get_tokenizer(tokenizer, context_length)
        # Plain values that build this model again; they travel in every checkpoint.
        self.config: dict[str, Any] = {
            "image_encoder": image_encoder,
            "image_encoder_args": dict(image_encoder_args or {}),
            "image_size": image_size,
            "embed_dim": embed_dim,
            "pooler": pooler,
            "pooler_queries": pooler_queries,
            "pooler_heads": pooler_heads,
            "tokenizer": self.tokenizer.spec,
            "context_length": context_length,
            "cls_mask": cls_mask,
            "text_width": text_width,
            "text_layers": text_layers,
            "text_heads": text_heads,
            "decoder_layers": decoder_layers,
            "dropout": dropout,
            "contrastive": contrastive,
            "tied_embeddings": tied_embeddings,
        }
        if decoder_layers and pooler == "single" and pooler_queries < 2:
            raise ValueError(
                "the single pooler needs at least 2 queries: one for the contrastive vector, the rest for the decoder"
            )
        vocab_size = self.tokenizer.vocab_size
        self.image_encoder = ImageEncoder(image_encoder, image_size, **(image_encoder_args or {}))
        self.pooling = ImagePooling(pooler, self.image_encoder.width, embed_dim, pooler_queries, pooler_heads)
        self.image_projection = nn.Linear(embed_dim, embed_dim, bias=False)
        self.text = TextTower(
            vocab_size, context_length, text_width, text_layers, text_heads, embed_dim, cls_mask, dropout
        )
        self.decoder = (
            Decoder(vocab_size, text_width, embed_dim, decoder_layers, text_heads, dropout) if decoder_layers else None
        )
        if tied_embeddings and self.decoder is not None:
            self.decoder.vocabulary.weight = self.text.token_embedding.weight
        # One dimension, not zero: sharding engines split along the first.
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1)) if contrastive == "siglip" else None
        self._frozen: set[str] = set()
        self.static_step: Step | None = None  # see `compile_generation`
        init_parameters(self)

    @property
    def image_size(self) -> int:
        return self.image_encoder.image_size

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def forward(
        self,
        images: Tensor | None,
        tokens: Tensor,
        lengths: Tensor | None = None,
        *,
        contrastive: bool = True,
        captioning: bool = True,
        prefix_lengths: Tensor | None = None,
    ) -> CoCaOutput:
        """Features and caption states of a batch of pairs.

        Args:
            images: (B, 3, H, W), uint8, or float that is normalised already; or tokens (B, S, C) that the image encoder
                or its `frozen_part` gave before. None: texts alone, which have no features; the decoder reads them
                without its cross blocks, that is, as a language model.
            tokens: (B, L) ids, padded at the end to any L. Without the contrastive part there may be several texts of
                each image, side by side.
            lengths: (B,) number of real tokens; found from the trailing pads if not given.
            contrastive, captioning: whether to compute what that loss needs; what is left out is None in the output.
            prefix_lengths: (B,) leading tokens that are not predicted, at least 1 for the start; 1 by default.
        """
        lengths = self._lengths(tokens, lengths)
        decoder = self.decoder if captioning else None
        vector, image_tokens = None, None
        if images is None:
            contrastive = False
        elif len(images) != len(tokens) and (contrastive or not len(images) or len(tokens) % len(images)):
            raise ValueError(f"every image needs one text: got {len(images)} images and {len(tokens)} texts")
        else:
            vector, image_tokens = self.pooling(self.image_encoder(images), contrastive, decoder is not None)
        states, text_vector, layout = self.text(tokens, lengths, contrastive)
        hidden, labels = None, None
        if decoder is not None:
            if image_tokens is not None:
                image_tokens = image_tokens.repeat_interleave(len(tokens) // max(len(image_tokens), 1), dim=0)
            hidden, labels = _caption_states(decoder, states, layout, tokens, lengths, image_tokens, prefix_lengths)
            if self.tokenizer.unk_id is not None:  # read, but never learned to be written
                labels = labels.masked_fill(labels == self.tokenizer.unk_id, IGNORED_LABEL)
        return CoCaOutput(
            image_features=F.normalize(self.image_projection(vector), dim=-1) if contrastive else None,
            text_features=F.normalize(text_vector, dim=-1) if contrastive else None,
            logit_scale=self.logit_scale.exp(),
            hidden=hidden,
            labels=labels,
            vocabulary=decoder.vocabulary.weight if decoder else None,
            logit_bias=self.logit_bias,
        )

    def predicted_tokens(self, tokens: Tensor, lengths: Tensor, prefix_lengths: Tensor) -> Tensor:
        """Number of tokens that the caption loss averages over: all after the prefix, without unknown words."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        asked = (places >= prefix_lengths[:, None]) & (places < lengths[:, None])  # (B, L)
        return (asked if self.tokenizer.unk_id is None else asked & (tokens != self.tokenizer.unk_id)).sum()

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """images (B, 3, H, W) -> image features (B, E), of unit length unless `normalize` is off."""
        vector, _ = self.pooling(self.image_encoder(images), captioning=False)
        features = self.image_projection(vector)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, lengths: Tensor | None = None, normalize: bool = True) -> Tensor:
        """tokens (B, L) -> text features (B, E), of unit length unless `normalize` is off."""
        _, features, _ = self.text(tokens, self._lengths(tokens, lengths))
        return F.normalize(features, dim=-1) if normalize else features

    def log_likelihood(self, images: Tensor, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """log p(text | image) (T,) of texts (T, L), in nats: the sum over their tokens after the start, but for words
        that the vocabulary lacks.

        Args:
            images: (B, 3, H, W) or tokens of the image encoder (B, S, C); T / B texts side by side for each.
        """
        self._check_decoder()
        lengths = self._lengths(tokens, lengths)
        out = self(images, tokens, lengths, contrastive=False)
        assert out.labels is not None
        losses = F.cross_entropy(out.logits.float(), out.labels, reduction="none", ignore_index=IGNORED_LABEL)  # (N,)
        text = torch.arange(len(lengths), device=losses.device).repeat_interleave(lengths - 1)  # (N,)
        return losses.new_zeros(len(lengths)).index_add(0, text, -losses)

    def multimodal_state(self, images: Tensor, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The decoder's state (B, D) at the last token of each text (B, L): it has seen the image and all the text."""
        decoder = self._check_decoder()
        lengths = self._lengths(tokens, lengths)
        _, image_tokens = self.pooling(self.image_encoder(images), contrastive=False)
        states, _, layout = self.text(tokens, lengths, contrastive=False)
        return layout.gather_at(decoder(states, image_tokens, layout), lengths - 1)

    @overload
    def generate(
        self,
        images: Tensor,
        *,
        return_scores: Literal[False] = False,
        return_attention: Literal[False] = False,
        **others: Unpack[GenerateArguments],
    ) -> Tensor: ...

    @overload
    def generate(
        self,
        images: Tensor,
        *,
        return_scores: Literal[True],
        return_attention: bool = False,
        **others: Unpack[GenerateArguments],
    ) -> Captions: ...

    @overload
    def generate(
        self,
        images: Tensor,
        *,
        return_scores: bool = False,
        return_attention: Literal[True],
        **others: Unpack[GenerateArguments],
    ) -> Captions: ...

    def generate(
        self,
        images: Tensor,
        *,
        prompt: str | Sequence[str] | None = None,
        strategy: Strategy = "greedy",
        num_beams: int | None = None,
        num_captions: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_length: int | None = None,
        max_length: int | None = None,
        length_penalty: float | None = None,
        repetition_penalty: float = 1.0,
        no_repeat_ngram: int = 0,
        generator: torch.Generator | None = None,
        scoring: Scoring = "log_prob",
        rerank: Rerank | None = None,
        rerank_weight: float | None = None,
        return_scores: bool = False,
        return_attention: bool = False,
    ) -> Tensor | Captions:
        """Captions of images (B, 3, H, W) as ids (B, L), padded, ended by the end id.

        `model.tokenizer.decode(row)` gives the text.

        Args:
            prompt: how every caption, or each one, begins.
            strategy: greedy, the likeliest token each time; beam, the likeliest of several captions; sample, drawn at
                random.
            num_beams: captions that beam search follows for each image, default 2.
            num_captions: makes the result (B, N, L): the best of the beams, best first, or N draws, in their order
                unless reranked.
            temperature, top_k, top_p: of sampling, applied in this order; the default draws from the model's own
                distribution.
            min_length: no end before so many tokens, start included (OpenCLIP's min_seq_len); default none, 5 in
                legacy scoring.
            max_length: most tokens, start and end included; default 30, or the context length if that is shorter.
            length_penalty: beams compare sum / length ** length_penalty, default 1; larger favours longer captions.
            repetition_penalty: above 1 makes tokens less likely that the caption contains already.
            no_repeat_ngram: no run of so many tokens occurs twice; 0 allows all.
            generator: source of random numbers for sampling, on the device of the model.
            scoring: log_prob, or openclip_legacy for the captions of OpenCLIP 3's beam search, which adds logits.
            rerank: contrastive puts the beams (all `num_beams`) or draws in the order of
                weight · exp(logit_scale) · cosine(image, caption) + (1 - weight) · mean log-probability.
            rerank_weight: that weight, between 0 and 1, default 0.2.
            return_scores, return_attention: return `Captions` instead of the ids alone. Attention (B, [N,] L, S) says
                where the decoder looked among the image tokens when it chose each token, on average over layers and
                heads: rows add up to 1, those of start and padding are 0.

        Raises:
            ValueError: options that do not go together or are out of range, prompts that are empty or too long, or a
            model without decoder.
        """
        options = Options(
            strategy=strategy,
            num_beams=num_beams,
            num_captions=num_captions,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_length=min_length,
            max_length=max_length,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
            no_repeat_ngram=no_repeat_ngram,
            generator=generator,
            scoring=scoring,
            rerank=rerank,
            rerank_weight=rerank_weight,
        )
        captions = generate(self, images, prompt, options, attention=return_attention)
        return captions if return_scores or return_attention else captions.ids

    def compile_generation(self, **options: Any) -> None:
        """From now on `generate` writes with static shapes and a step compiled by `torch.compile(**options)`, once for
        each number of captions in a batch and each `max_length`: worth it for many batches of one size.
        """
        self.static_step = torch.compile(static_step, fullgraph=True, **options)

    def freeze(self, *names: str) -> list[str]:
        """Stops the training of the modules and parameters called `names`, for good, and returns the parameters.

        A name may be a pattern: `image_encoder.trunk.blocks.[0-4]` are five stages.

        Whole modules also stay in evaluation mode, so that batch norms keep their statistics and dropout stays off.
        """
        parameters = [(n, p) for n, p in self.named_parameters() if any(_is_part(n, name) for name in names)]
        if unknown := [name for name in names if not any(_is_part(n, name) for n, _ in parameters)]:
            parts = ", ".join(name for name, _ in self.named_children())
            raise ValueError(f"nothing in the model is called {', '.join(unknown)}; parts that can be frozen: {parts}")
        for _, parameter in parameters:
            parameter.requires_grad_(False)
        self._frozen.update(n for n, _ in self.named_modules() if any(fnmatchcase(n, name) for name in names))
        self.train(self.training)
        return [name for name, _ in parameters]

    def train(self, mode: bool = True) -> "CoCa":
        super().train(mode)
        for name, module in self.named_modules():
            if name in self._frozen:
                module.eval()
        return self

    def parameters_of_loss(self, loss: str) -> list[str]:
        """Names of the parts that only the "contrastive" or only the "caption" loss trains; without that loss they
        get no gradient.
        """
        if loss == "contrastive":
            separate = ["pooling.contrastive"] if self.pooling.variant != "single" else []
            bias = ["logit_bias"] if self.logit_bias is not None else []
            text = ["text.cls_embedding", "text.norm", "text.projection"]
            return [*separate, "image_projection", *text, "logit_scale", *bias]
        if loss == "caption":
            separate = ["pooling.generative"] if self.pooling.variant == "parallel" else []
            return [*separate, *(["decoder"] if self.decoder is not None else [])]
        raise ValueError(f"loss must be 'contrastive' or 'caption', got '{loss}'")

    def set_grad_checkpointing(self, kind: GradCheckpointing = "blocks") -> None:
        """What the backward pass computes again instead of keeping it.

        blocks: every transformer block, for about a third more time. cross_attention: the decoder's cross blocks, whose
        keys and values of the image tokens are the largest tensors that short captions leave, for about 6 % more.
        """
        if kind not in get_args(GradCheckpointing):
            raise ValueError(
                f"grad_checkpointing must be one of {', '.join(get_args(GradCheckpointing))}, got {kind!r}"
            )
        self.image_encoder.trunk.set_grad_checkpointing(kind == "blocks")
        self.text.grad_checkpointing = kind
        if self.decoder is not None:
            self.decoder.grad_checkpointing = kind

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Runs every transformer block through `torch.compile`, in place: names in checkpoints stay as they are.

        Equal blocks share their code, and what depends on the lengths of the captions stays outside, so there are a
        few compilations in the first steps (the second length makes it a variable) and none after.
        """
        for module in self.modules():
            if isinstance(module, SelfBlock | CrossBlock | Block):
                module.compile(backend=backend)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keeps the temperature in CLIP's range: a scale between 1 and 100."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def _check_decoder(self) -> Decoder:
        if self.decoder is None:
            raise ValueError("this model was built for retrieval only (decoder_layers=0) and has no decoder")
        return self.decoder

    def _lengths(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have the shape (batch, length), got {tuple(tokens.shape)}")
        lengths = text_lengths(tokens, self.tokenizer.pad_id) if lengths is None else lengths
        if tokens.shape[1] > self.text.context_length and int(lengths.max()) > self.text.context_length:
            raise ValueError(
                f"texts of {int(lengths.max())} tokens do not fit the context of {self.text.context_length}"
            )
        return lengths


def _is_part(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def text_lengths(tokens: Tensor, pad_id: int) -> Tensor:
    """Number of tokens (B,) up to the last one that is not padding, at least 1. Ids equal to `pad_id` inside a text
    count as text.
    """
    positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return (positions * (tokens != pad_id)).amax(dim=1).clamp(min=1)


def _caption_states(
    decoder: Decoder,
    states: Tensor,
    text: Layout,
    tokens: Tensor,
    lengths: Tensor,
    image_tokens: Tensor | None,
    prefix_lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Decoder states that predict a real token, and that token: the last token of each caption predicts nothing, and
    tokens that are given are not predicted.
    """
    layout = Layout(lengths - 1, text.packed)
    predicts = text.positions < lengths[:, None] - 1  # (B, L)
    states = text.compact(states, predicts) if text.packed else states[:, : layout.longest]
    hidden = decoder(states, image_tokens, layout)  # (N, D), or (B, T - 1, D) if padded
    asked = (
        layout.mask if prefix_lengths is None else layout.mask & (layout.positions >= prefix_lengths[:, None] - 1)
    )  # (B, T - 1)
    return layout.compact(hidden, asked), tokens[:, 1 : layout.longest + 1][asked]
