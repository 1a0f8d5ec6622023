"""CoCa: one network that embeds images and texts in a common space and captions images (arXiv 2205.01917).

images ─ ImageEncoder ─ Pooling ──────┬─ contrastive vector ─ projection ─ image features ─┐
                                      └─ image tokens ──────────────┐                      ├─ contrastive loss
tokens ─ TextTower ───────────────────┬─ CLS ─ projection ─ text features ─────────────────┘
                                      └─ token states ─ Decoder ────┴─ next-token logits ──── caption loss
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.errors import check_choice, check_number
from coca_lit.models.generation.generate import write_captions
from coca_lit.models.image import build_image_encoder
from coca_lit.models.init import init_projection
from coca_lit.models.inputs import FramePooling, Images, Interpolation, Preprocessing, ResizeMode, preprocessing
from coca_lit.models.likelihood import log_likelihood
from coca_lit.models.packing import Layout, expect_to_fit, expect_tokens, text_lengths
from coca_lit.models.poolers import PoolingSizes, build_pooling
from coca_lit.models.registry import IMAGE_ENCODERS, POOLERS, TEXT_TOWERS, build_from
from coca_lit.models.text import ClsMask, Decoder, TextSizes, build_text_tower, expect_decoder
from coca_lit.models.trainable import Trainable
from coca_lit.tokenizer import CONTEXT_LENGTH, get_tokenizer

Contrastive = Literal["softmax", "siglip"]

SIZES = (  # arguments that are whole numbers of at least 1
    *("image_size", "embed_dim", "pooler_queries", "pooler_heads"),
    *("context_length", "text_width", "text_layers", "text_heads"),
)
IGNORED_LABEL = -100
MAX_LOGIT_SCALE = math.log(100)  # the bound that CLIP puts on the temperature


class CoCaOutput(NamedTuple):
    """What the two losses need. N is the number of predicted tokens in the batch: each caption's tokens after the
    start token, without padding.
    """

    image_features: Tensor | None  # (B, E), unit length
    text_features: Tensor | None  # (B, E), unit length
    logit_scale: Tensor  # (1,), the inverse temperature: exp of the parameter `logit_scale`
    hidden: Tensor | None  # (N, D), decoder states before the vocabulary projection, caption after caption
    labels: Tensor | None  # (N,), the token that follows each of them
    vocabulary: Tensor | None  # (V, D), weight of the vocabulary projection
    logit_bias: Tensor | None  # (1,), of a model with contrastive="siglip"

    @property
    def logits(self) -> Tensor:
        """Next-token logits (N, V). The training loss works from `hidden` and need not hold them all."""
        if self.hidden is None or self.vocabulary is None:
            raise ValueError("no caption logits: the model has no decoder, or captioning was off")
        return F.linear(self.hidden, self.vocabulary)


class CoCa(Trainable):
    """Contrastive captioner.

    Args:
        image_encoder: name of a timm model or of an encoder registered with `register_image_encoder`, such as "naflex"
            for images of any shape, see `NaFlexEncoder`.
        image_encoder_args: its arguments (depth, embed_dim, …; for a vision transformer `patch_drop_rate`, the share of
            patches that each training step leaves out).
        image_size: side of the square input in pixels. Images of any shape have as many patches as that square.
        embed_dim: width of the common space and of the image tokens.
        pooler: single, see `SinglePooling`; parallel | cascade, see `TwoPoolers`; openclip_parallel | openclip_cascade,
            see `OpenClipPooling`; masked_parallel | masked_cascade, of naflex, see `MaskedPooling`; mean | mean_all,
            without and with the class token, see `MeanPooling`; or one registered with `register_pooler`.
        pooler_args: further arguments of the pooler.
        pooler_queries: learned queries of the (generative) pooler.
        pooler_heads: attention heads of the poolers.
        tokenizer: "clip", "r50k" (GPT-2's byte pairs), a word list or a packed `tokenizer.json`, for `get_tokenizer`;
            it defines vocabulary and special ids.
        context_length: tokens of a text at most, start and end included.
        cls_mask: correct | legacy, see `TextTower`.
        text_width: width of the text tower and of the decoder.
        text_layers: blocks of the text tower.
        text_heads: attention heads of the text tower and of the decoder.
        decoder_layers: pairs of self- and cross-attention blocks; 0 leaves it out: features alone.
        dropout: rate in the text tower and the decoder.
        contrastive: softmax (CLIP), or siglip, which adds a learned bias to the temperature.
        tied_embeddings: whether the vocabulary projection is the token embedding (Press and Wolf 2017).
        text_tower: name of a tower registered with `register_text_tower`; None for `TextTower`, "modern" for
            `ModernTextTower`, "two_pass" for MaMMUT's `TwoPassTower`.
        text_tower_args: arguments of a registered tower in addition to `TextTower`'s.
        decoder_args: further arguments of the decoder that goes with the text tower, see its `make_decoder`.
        frame_pooling: of clips (B, F, 3, H, W). tokens: the poolers see the tokens of all frames (VideoCoCa, Yan et al.
            2022, arXiv 2212.04979). mean: means over the frames of what they make of each (CoCa's zero-shot).
        frame_positions: the number of frames for which each has a learned position, added to its tokens; 0 for none:
            the order of frames then has no effect.
        interpolation, resize_mode: how images become `image_size`, see `build_transform`. They travel with the weights.
    """

    def __init__(
        self,
        *,
        image_encoder: str = "vit_base_patch32_clip_224",
        image_encoder_args: dict[str, Any] | None = None,
        image_size: int = 224,
        embed_dim: int = 512,
        pooler: str = "single",
        pooler_args: dict[str, Any] | None = None,
        pooler_queries: int = 256,
        pooler_heads: int = 8,
        tokenizer: str | Sequence[str] | Mapping[str, str] = "clip",
        context_length: int = CONTEXT_LENGTH,
        cls_mask: ClsMask = "correct",
        text_width: int = 512,
        text_layers: int = 12,
        text_heads: int = 8,
        decoder_layers: int = 12,
        dropout: float = 0.0,
        contrastive: Contrastive = "softmax",
        tied_embeddings: bool = False,
        text_tower: str | None = None,
        text_tower_args: dict[str, Any] | None = None,
        decoder_args: dict[str, Any] | None = None,
        frame_pooling: FramePooling = "tokens",
        frame_positions: int = 0,
        interpolation: Interpolation = "bicubic",
        resize_mode: ResizeMode = "shortest",
    ) -> None:
        super().__init__()
        # Plain values that build this model again; they are stored in every checkpoint.
        self.config: dict[str, Any] = {
            "image_encoder": IMAGE_ENCODERS.spec(image_encoder),
            "image_encoder_args": dict(image_encoder_args or {}),
            "image_size": image_size,
            "embed_dim": embed_dim,
            "pooler": POOLERS.spec(pooler),
            "pooler_args": pooler_args,
            "pooler_queries": pooler_queries,
            "pooler_heads": pooler_heads,
            "tokenizer": tokenizer,
            "context_length": context_length,
            "cls_mask": cls_mask,
            "text_width": text_width,
            "text_layers": text_layers,
            "text_heads": text_heads,
            "decoder_layers": decoder_layers,
            "dropout": dropout,
            "contrastive": contrastive,
            "tied_embeddings": tied_embeddings,
            "text_tower": text_tower and TEXT_TOWERS.spec(text_tower),
            "text_tower_args": text_tower_args,
            "decoder_args": decoder_args,
            "frame_pooling": frame_pooling,
            "frame_positions": frame_positions,
            "interpolation": interpolation,
            "resize_mode": resize_mode,
        }
        _check(self.config)
        self.tokenizer = get_tokenizer(tokenizer, context_length)
        self.config["tokenizer"] = self.tokenizer.spec
        self.image_encoder = build_image_encoder(image_encoder, image_size, **(image_encoder_args or {}))
        pooled = PoolingSizes(
            self.image_encoder, embed_dim, pooler_queries, pooler_heads, text_width, captions=decoder_layers > 0
        )
        self.pooling = build_pooling(pooler, pooled, **(pooler_args or {}))
        self.pooling.frame_pooling = frame_pooling
        if frame_positions:
            self.pooling.frame_positions = nn.Parameter(torch.empty(frame_positions, 1, self.image_encoder.width))
        self.image_projection: nn.Module = nn.Identity()
        if self.pooling.projected:
            self.image_projection = nn.Linear(self.pooling.vector_width, embed_dim, bias=False)
        sizes = TextSizes(
            self.tokenizer.vocab_size, context_length, text_width, text_layers, text_heads, embed_dim, cls_mask, dropout
        )
        self.text = build_text_tower(text_tower, sizes, **(text_tower_args or {}))
        self.text.pad_id = self.tokenizer.pad_id
        self.decoder: Decoder | None = None
        if decoder_layers:
            given = {"sizes": sizes, "image_width": self.pooling.token_width, "layers": decoder_layers}
            self.decoder = build_from(self.text.make_decoder, "decoder_args", given, decoder_args or {})
        if tied_embeddings and self.decoder is not None:
            self.decoder.vocabulary.weight = self.text.token_embedding.weight
        # One dimension, not zero: sharding engines split along the first.
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1)) if contrastive == "siglip" else None
        self.preprocessing: Preprocessing = preprocessing(image_size, interpolation, resize_mode)
        self.preprocessing.update(self.image_encoder.preprocessing)  # type: ignore[typeddict-item]
        self.init_parameters()

    def init_parameters(self) -> None:
        """Overwrites all parameters with initial values."""
        self.image_encoder.init_parameters()
        self.pooling.init_parameters()
        if self.pooling.frame_positions is not None:
            nn.init.zeros_(self.pooling.frame_positions)  # a model of images starts as it is
        if isinstance(self.image_projection, nn.Linear):
            init_projection(self.image_projection)
        self.text.init_parameters()
        if self.decoder is not None:
            self.decoder.init_parameters(tied=self.config["tied_embeddings"])
        if self.logit_bias is None:
            nn.init.constant_(self.logit_scale, math.log(1 / 0.07))  # CLIP's initial temperature
        else:  # SigLIP's (Zhai et al. 2023, section 3.2): at first nearly every pair counts as unrelated, as it is
            nn.init.constant_(self.logit_scale, math.log(10))
            nn.init.constant_(self.logit_bias, -10)

    @property
    def image_size(self) -> int:
        return self.image_encoder.image_size

    def set_image_size(self, image_size: int) -> None:
        """From now on the model takes images of this size, see `ImageEncoder.set_image_size`."""
        self.image_encoder.set_image_size(image_size)
        self.preprocessing["size"] = image_size
        self.config["image_size"] = image_size

    def set_frame_pooling(self, frame_pooling: FramePooling) -> None:
        """From now on clips are pooled that way."""
        self.config["frame_pooling"] = frame_pooling
        _check(self.config)
        self.pooling.frame_pooling = frame_pooling

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def forward(
        self,
        images: Images,
        tokens: Tensor,
        lengths: Tensor | None = None,
        *,
        contrastive: bool = True,
        captioning: bool = True,
        prefix_lengths: Tensor | None = None,
        on_text_features: Callable[[Tensor], None] | None = None,
    ) -> CoCaOutput:
        """Features and caption states of a batch of pairs.

        Args:
            images: (B, 3, H, W), uint8, or normalised floats, or `Patches`; or clips (B, F, 3, H, W); or what the image
                encoder or its `frozen_part` makes of them.
            tokens: (B, L) ids, padded at the end to any L.
            lengths: (B,) number of real tokens; None finds them from the trailing pads. On the host: to copy them
                there, or to find them, the host has to wait for the device.
            contrastive, captioning: whether to compute what that loss needs; the output is None where it is off.
            prefix_lengths: (B,) leading tokens that are not predicted, at least 1 for the start; 1 by default. Also
                on the host.
            on_text_features: gets the text features before the images are encoded, to send them to other processes
                meanwhile. A sharded network must be called as a whole, so its text tower cannot be called first.
        """
        lengths, decoder = self.lengths_of(tokens, lengths), self.decoder if captioning else None
        if len(images) != len(tokens):
            raise ValueError(f"every image needs one text: got {len(images)} images and {len(tokens)} texts")
        image_features, text_features, hidden, labels, vocabulary = None, None, None, None, None
        states, text_vector, layout = self.text(tokens, lengths, contrastive)
        if text_vector is not None:
            text_features = F.normalize(text_vector, dim=-1)
            if on_text_features is not None:
                on_text_features(text_features)
        vector, image_tokens = self.pooling(self.image_encoder(images), contrastive, decoder is not None)
        if decoder is not None:
            hidden, labels = self.predict(states, layout, tokens, lengths, image_tokens, prefix_lengths)
            vocabulary = decoder.vocabulary.weight
        if vector is not None:
            image_features = F.normalize(self.image_projection(vector), dim=-1)
        scale, bias = self.logit_scale.exp(), self.logit_bias
        return CoCaOutput(image_features, text_features, scale, hidden, labels, vocabulary, bias)

    def captions_of(self, image_tokens: Tensor | None, tokens: Tensor, lengths: Tensor | None = None) -> CoCaOutput:
        """The caption half of `forward` for any texts.

        Args:
            image_tokens: (B, Q, E) of `encode_image_tokens`, those of one image for each text. None: texts alone pass
                the decoder without its cross blocks, as in a language model.
            tokens, lengths: as of `forward`.
        """
        lengths = self.lengths_of(tokens, lengths)
        states, _, layout = self.text(tokens, lengths, contrastive=False)
        hidden, labels = self.predict(states, layout, tokens, lengths, image_tokens)
        vocabulary = expect_decoder(self.decoder).vocabulary.weight
        return CoCaOutput(None, None, self.logit_scale.exp(), hidden, labels, vocabulary, self.logit_bias)

    def predict(
        self,
        states: Tensor,
        layout: Layout,
        tokens: Tensor,
        lengths: Tensor,
        image_tokens: Tensor | None,
        prefix_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decoder states (N, D) that predict the tokens (B, L) after the prefix, and these tokens as labels (N,).

        Args:
            states, layout: of the text tower.
            lengths: (B,), on the host.
        """
        prefix_lengths = None if prefix_lengths is None else prefix_lengths.cpu()
        decoder = expect_decoder(self.decoder)
        hidden, labels = decoder.caption_states(states, layout, tokens, lengths, image_tokens, prefix_lengths)
        if self.tokenizer.unk_id is not None:  # unknown words are read but never predicted
            labels = labels.masked_fill(labels == self.tokenizer.unk_id, IGNORED_LABEL)
        return hidden, labels

    def encode_image(self, images: Images, normalize: bool = True) -> Tensor:
        """images (B, 3, H, W) or clips (B, F, 3, H, W) -> features (B, E), of unit length unless `normalize` is off."""
        vector, _ = self.pooling(self.image_encoder(images), captioning=False)
        features = self.image_projection(vector)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, lengths: Tensor | None = None, normalize: bool = True) -> Tensor:
        """tokens (B, L) -> text features (B, E), of unit length unless `normalize` is off."""
        _, features, _ = self.text(tokens, self.lengths_of(tokens, lengths))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_image_tokens(self, images: Images) -> Tensor:
        """images (B, 3, H, W), or clips (B, F, 3, H, W), -> the tokens that the decoder attends to (B, Q, E)."""
        _, tokens = self.pooling(self.image_encoder(images), contrastive=False)
        return tokens

    def multimodal_states(self, images: Images, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Layout]:
        """The decoder's states at all tokens of each text (B, L), and their layout; `lengths` (B,) on the host."""
        decoder = expect_decoder(self.decoder)
        image_tokens = self.encode_image_tokens(images)
        states, _, layout = self.text(tokens, lengths, contrastive=False)
        return decoder(states, image_tokens, layout), layout

    generate = write_captions  # its options: coca_lit/models/generation/options.py
    log_likelihood = log_likelihood

    def parameters_of_loss(self, loss: str) -> list[str]:
        """Names of the parts that only the "contrastive" or only the "caption" loss trains; without that loss they
        get no gradient.
        """
        separate = [f"pooling.{part}" for part in self.pooling.parts_of_loss(loss)]
        if loss == "contrastive":
            bias = ["logit_bias"] if self.logit_bias is not None else []
            projection = ["image_projection"] if self.pooling.projected else []
            text = [f"text.{part}" for part in self.text.contrastive_only]
            return [*separate, *projection, *text, "logit_scale", *bias]
        if loss == "caption":
            return [*separate, *(["decoder"] if self.decoder is not None else [])]
        raise ValueError(f"loss must be 'contrastive' or 'caption', got '{loss}'")

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keeps the temperature in CLIP's range: a scale between 1 and 100."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def lengths_of(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Number of real tokens (B,) of each text (B, L), on the host; found from the trailing pads if not given."""
        expect_tokens(tokens)
        lengths = (text_lengths(tokens, self.tokenizer.pad_id) if lengths is None else lengths).cpu()
        if tokens.shape[1] > self.text.context_length:
            expect_to_fit(int(lengths.max()), self.text.context_length)
        return lengths


def _check(config: Mapping[str, Any]) -> None:
    """Raises `ValueError` for arguments of `CoCa` that cannot work, or that a checkpoint could not store."""
    for name in ("image_encoder_args", "pooler_args", "text_tower_args", "decoder_args"):
        try:
            json.dumps(config[name])
        except TypeError as error:
            raise ValueError(f"{name} must be plain numbers and texts, got {config[name]!r}: {error}") from error
    for name in SIZES:
        check_number(name, config[name], whole=True, at_least=1)
    check_number("decoder_layers", config["decoder_layers"], whole=True, at_least=0)
    check_number("dropout", config["dropout"], at_least=0, at_most=1)
    check_number("frame_positions", config["frame_positions"], whole=True, at_least=0)
    for name, kind in {"contrastive": Contrastive, "cls_mask": ClsMask, "frame_pooling": FramePooling}.items():
        check_choice(name, config[name], get_args(kind))
