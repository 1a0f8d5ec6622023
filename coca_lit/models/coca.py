"""CoCa: one network that embeds images and texts in a common space and captions images (arXiv 2205.01917).

images ─ ImageEncoder ─ Pooling ──────┬─ contrastive vector ─ projection ─ image features ─┐
                                      └─ image tokens ──────────────┐                      ├─ contrastive loss
tokens ─ TextTower ───────────────────┬─ CLS ─ projection ─ text features ─────────────────┘
                                      └─ token states ─ Decoder ────┴─ next-token logits ──── caption loss
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.models.config import CoCaConfig
from coca_lit.models.generation.generate import write_captions
from coca_lit.models.image import build_image_encoder
from coca_lit.models.init import init_projection
from coca_lit.models.inputs import FramePooling, Images, Preprocessing, preprocessing
from coca_lit.models.likelihood import log_likelihood
from coca_lit.models.packing import Layout, expect_to_fit, expect_tokens, text_lengths
from coca_lit.models.poolers import PoolingSizes, build_pooling
from coca_lit.models.registry import IMAGE_ENCODERS, POOLERS, TEXT_TOWERS, build_from
from coca_lit.models.text import Decoder, TextSizes, build_text_tower, expect_decoder
from coca_lit.models.trainable import Trainable
from coca_lit.tokenizer import get_tokenizer

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
        config: see `CoCaConfig`.
        arguments: its fields, which replace those of `config`, or its defaults.
    """

    def __init__(
        self, config: CoCaConfig | None = None, **arguments: Annotated[Any, "coca_lit.models.config.CoCaConfig"]
    ) -> None:
        super().__init__()
        config = replace(config or CoCaConfig(), **arguments)
        self.tokenizer = get_tokenizer(config.tokenizer, config.context_length)
        self.config = replace(
            config,
            image_encoder=IMAGE_ENCODERS.spec(config.image_encoder),
            image_encoder_args=dict(config.image_encoder_args or {}),
            pooler=POOLERS.spec(config.pooler),
            text_tower=config.text_tower and TEXT_TOWERS.spec(config.text_tower),
            tokenizer=self.tokenizer.spec,
        )
        encoder_args = config.image_encoder_args or {}
        self.image_encoder = build_image_encoder(config.image_encoder, config.image_size, **encoder_args)
        pooling_sizes = PoolingSizes(
            self.image_encoder,
            config.embed_dim,
            config.pooler_queries,
            config.pooler_heads,
            config.text_width,
            captions=config.decoder_layers > 0,
        )
        self.pooling = build_pooling(config.pooler, pooling_sizes, **(config.pooler_args or {}))
        self.pooling.frame_pooling = config.frame_pooling
        if config.frame_positions:
            positions = torch.empty(config.frame_positions, 1, self.image_encoder.width)
            self.pooling.frame_positions = nn.Parameter(positions)
        self.image_projection: nn.Module = nn.Identity()
        if self.pooling.projected:
            self.image_projection = nn.Linear(self.pooling.vector_width, config.embed_dim, bias=False)
        text_sizes = TextSizes(
            self.tokenizer.vocab_size,
            config.context_length,
            config.text_width,
            config.text_layers,
            config.text_heads,
            config.embed_dim,
            config.cls_mask,
            config.dropout,
        )
        self.text = build_text_tower(config.text_tower, text_sizes, **(config.text_tower_args or {}))
        self.text.pad_id = self.tokenizer.pad_id
        self.decoder: Decoder | None = None
        if config.decoder_layers:
            given = {"sizes": text_sizes, "image_width": self.pooling.token_width, "layers": config.decoder_layers}
            self.decoder = build_from(self.text.make_decoder, "decoder_args", given, config.decoder_args or {})
        if config.tied_embeddings and self.decoder is not None:
            self.decoder.vocabulary.weight = self.text.token_embedding.weight
        # One dimension, not zero: sharding engines split along the first.
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1)) if config.contrastive == "siglip" else None
        self.preprocessing: Preprocessing = preprocessing(config.image_size, config.interpolation, config.resize_mode)
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
            self.decoder.init_parameters(tied=self.config.tied_embeddings)
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
        self.config = replace(self.config, image_size=image_size)

    def set_frame_pooling(self, frame_pooling: FramePooling) -> None:
        """From now on clips are pooled that way."""
        self.config = replace(self.config, frame_pooling=frame_pooling)
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
