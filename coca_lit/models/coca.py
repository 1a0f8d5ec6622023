"""CoCa: one network that embeds images and texts in a common space and captions images (arXiv 2205.01917).

images ─ ImageEncoder ─ Pooling ──────┬─ contrastive vector ─ projection ─ image features ─┐
                                      └─ image tokens ──────────────┐                      ├─ contrastive loss
tokens ─ TextTower ───────────────────┬─ CLS ─ projection ─ text features ─────────────────┘
                                      └─ token states ─ Decoder ────┴─ next-token logits ──── caption loss
"""

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit import extensions
from coca_lit.errors import check_choice
from coca_lit.models.config import CoCaConfig
from coca_lit.models.generation.generate import write_captions
from coca_lit.models.image import build_image_encoder
from coca_lit.models.init import init_projection
from coca_lit.models.inputs import Images, Preprocessing, preprocessing
from coca_lit.models.likelihood import log_likelihood
from coca_lit.models.packing import Layout, expect_to_fit, expect_tokens, text_lengths, to_device
from coca_lit.models.poolers import PoolingSizes, build_pooling
from coca_lit.models.registry import IMAGE_ENCODERS, POOLERS, TEXT_TOWERS, build_from
from coca_lit.models.text import Decoder, TextSizes, build_text_tower, expect_decoder
from coca_lit.models.trainable import Trainable
from coca_lit.tokenizer import get_tokenizer

IGNORED_LABEL = -100
MAX_LOGIT_SCALE = math.log(100)  # the bound that CLIP puts on the temperature


# What a forward pass can be asked for; labels come with "hidden".
CONTRASTIVE = ("image_features", "text_features", "logit_scale", "logit_bias")
CAPTION = ("hidden", "vocabulary")
OUTPUTS = (*CONTRASTIVE, *CAPTION, "pooled", "image_tokens", "encoded", "text_states", "further_text_features")
POOLED = frozenset({"image_features", "pooled"})  # outputs that follow from the contrastive vector of an image
READ = frozenset({"hidden", "image_tokens"})  # from the image tokens that the decoder attends to
TEXT_OUTPUTS = frozenset({"hidden", "text_features", "text_states"})  # from the texts that the images come with
TEXT_FEATURES = frozenset({"text_features", "further_text_features"})  # from the contrastive vector of a text


class CoCaOutput(NamedTuple):
    """What a forward pass has computed; None for what it was not asked for, or what the model does not have. N is the
    number of predicted tokens in the batch: each caption's tokens after the start token, without padding.
    """

    image_features: Tensor | None = None  # (B, E), unit length
    text_features: Tensor | None = None  # (B, E), unit length
    logit_scale: Tensor = torch.ones(1)  # (1,), the inverse temperature: exp of the parameter `logit_scale`
    hidden: Tensor | None = None  # (N, D), decoder states before the vocabulary projection, caption after caption
    labels: Tensor | None = None  # (N,), the token that follows each of them
    vocabulary: Tensor | None = None  # (V, D), weight of the vocabulary projection
    logit_bias: Tensor | None = None  # (1,), of a model with contrastive="siglip"
    pooled: Tensor | None = None  # (B, P), the contrastive vector of an image before its projection
    image_tokens: Tensor | None = None  # (B, Q, T), what the decoder attends to
    encoded: Images | None = None  # tokens of the image encoder; of images (B, S, C)
    text_states: Tensor | None = None  # (B, L, D), of the text tower at each token; 0 after the end of a text
    further_text_features: Tensor | None = None  # (B, K - 1, E), unit length, of further captions of each image
    token_count: Tensor | None = None  # of a micro-batch: the labels of the whole batch on all ranks that count

    @property
    def logits(self) -> Tensor:
        """Next-token logits (N, V). The training loss works from `hidden` and need not hold them all."""
        if self.hidden is None or self.vocabulary is None:
            raise ValueError("no caption logits: the model has no decoder, or `needs` left captioning out")
        return F.linear(self.hidden, self.vocabulary)


class CoCa(Trainable):
    """Contrastive captioner.

    Args:
        config: see `CoCaConfig`.
        arguments: others than in `config`, or than the defaults.

    Attributes:
        objectives: those that are kept with a trained network, by name, see `register_objective`. They are no part of
            it: `.to(device)` leaves them where they are.
    """

    def __init__(
        self,
        config: CoCaConfig | None = None,
        **arguments: Annotated[Any, "coca_lit.models.config.CoCaConfig", extensions.MODEL_OPTIONS],
    ) -> None:
        super().__init__()
        config = (config or CoCaConfig()).changed(**arguments)
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
        for name, value in config.options.items():
            self.set_option(name, value)
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
        if self.image_encoder.input_kind is not None:
            self.preprocessing["input_kind"] = self.image_encoder.input_kind
        self.objectives: dict[str, Any] = {}
        self.init_parameters()

    def init_parameters(self) -> None:
        """Overwrites all parameters with initial values."""
        self.image_encoder.init_parameters()
        self.pooling.init_parameters()
        for name in self.pooling.added:
            nn.init.zeros_(getattr(self.pooling, name))  # a model of images starts as it is
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

    def set_option(self, name: str, value: Any) -> None:
        """From now on another kind of input is taken that way, see `ModelOption`.

        Raises:
            ValueError: the value is wrong.
        """
        extensions.load(extensions.model_options()[name].apply)(self, value)
        self.config = self.config.changed(**{name: value})
        self.pooling.options = self.config.options

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def forward(
        self,
        images: Images,
        tokens: Tensor,
        lengths: Tensor | None = None,
        *,
        needs: Collection[str] = (*CONTRASTIVE, *CAPTION),
        prefix_lengths: Tensor | None = None,
        further_tokens: Tensor | None = None,
        further_lengths: Tensor | None = None,
    ) -> CoCaOutput:
        """What losses need of a batch of pairs. Only what is asked for is computed.

        Args:
            images: (B, 3, H, W), uint8, or normalised floats; or an `Input`; or what the image encoder or its
                `frozen_part` makes of them.
            tokens: (B, L) ids, padded at the end to any L.
            lengths: (B,) number of real tokens; None finds them from the trailing pads. On the host: to copy them
                there, or to find them, the host has to wait for the device.
            needs: fields of the output, see `OUTPUTS`.
            prefix_lengths: (B,) leading tokens that are not predicted, at least 1 for the start; 1 by default. Also
                on the host.
            further_tokens: (B, K - 1, L) ids of further captions of each image, for "further_text_features" alone.
            further_lengths: (B, K - 1), as `lengths`.

        Raises:
            ValueError: there is no such output, or no further caption to make one of.
        """
        check_outputs(needs)
        if self.decoder is None:
            needs = [name for name in needs if name != "hidden"]
        lengths = self.lengths_of(tokens, lengths)
        if len(images) != len(tokens):
            raise ValueError(f"every image needs one text: got {len(images)} images and {len(tokens)} texts")
        out = CoCaOutput(None, None, self.logit_scale.exp(), logit_bias=self.logit_bias)
        if not TEXT_OUTPUTS.isdisjoint(needs):
            states, text_vector, layout = self.text(tokens, lengths, contrastive="text_features" in needs)
            if text_vector is not None:
                out = out._replace(text_features=F.normalize(text_vector, dim=-1))
            if "text_states" in needs:
                out = out._replace(text_states=_states_of_tokens(states, layout, tokens, lengths))
        if "further_text_features" in needs:
            if further_tokens is None:
                raise ValueError("further_text_features need several captions of each image: set data.captions")
            further_lengths = None if further_lengths is None else further_lengths.flatten()
            features = self.encode_text(further_tokens.flatten(0, 1), further_lengths)
            out = out._replace(further_text_features=features.unflatten(0, further_tokens.shape[:2]))
        pooled = not POOLED.isdisjoint(needs)
        read = not READ.isdisjoint(needs)
        if pooled or read or "encoded" in needs:
            encoded = self.image_encoder(images)
            if "encoded" in needs:
                out = out._replace(encoded=encoded)
        if pooled or read:
            vector, image_tokens = self.pooling(encoded, contrastive=pooled, captioning=read)
            if "pooled" in needs:
                out = out._replace(pooled=vector)
            if "image_tokens" in needs:
                out = out._replace(image_tokens=image_tokens)
        if "hidden" in needs:
            hidden, labels = self.predict(states, layout, tokens, lengths, image_tokens, prefix_lengths)
            out = out._replace(hidden=hidden, labels=labels)
        if "vocabulary" in needs and self.decoder is not None:
            out = out._replace(vocabulary=self.decoder.vocabulary.weight)
        if "image_features" in needs:
            out = out._replace(image_features=F.normalize(self.image_projection(vector), dim=-1))
        return out

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
        """images (B, 3, H, W) -> features (B, E), of unit length unless `normalize` is off."""
        vector, _ = self.pooling(self.image_encoder(images), captioning=False)
        features = self.image_projection(vector)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, lengths: Tensor | None = None, normalize: bool = True) -> Tensor:
        """tokens (B, L) -> text features (B, E), of unit length unless `normalize` is off."""
        _, features, _ = self.text(tokens, self.lengths_of(tokens, lengths))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_image_tokens(self, images: Images) -> Tensor:
        """images (B, 3, H, W) -> the tokens that the decoder attends to (B, Q, E)."""
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

    def parts_for(self, needs: Collection[str]) -> list[str]:
        """Names of the parts that some outputs of `forward` depend on: a loss of these outputs gives no other part a
        gradient.

        Raises:
            ValueError: there is no such output.
        """
        check_outputs(needs)
        pooled = not POOLED.isdisjoint(needs)
        read = not READ.isdisjoint(needs)
        parts: list[str] = []
        if pooled or read or "encoded" in needs:
            parts.append("image_encoder")
        if pooled or read:
            unused: set[str] = set()
            if not pooled:
                unused.update(self.pooling.parts_of_loss("contrastive"))
            if not read:
                unused.update(self.pooling.parts_of_loss("caption"))
            parts += [f"pooling.{name}" for name in _children(self.pooling) if name not in unused]
        if "image_features" in needs and self.pooling.projected:
            parts.append("image_projection")
        if not (TEXT_OUTPUTS | TEXT_FEATURES).isdisjoint(needs):
            left_out = self.text.contrastive_only if TEXT_FEATURES.isdisjoint(needs) else ()
            parts += [f"text.{name}" for name in _children(self.text) if name not in left_out]
        if "logit_scale" in needs:
            parts.append("logit_scale")
        if "logit_bias" in needs and self.logit_bias is not None:
            parts.append("logit_bias")
        if self.decoder is not None:
            for name in _children(self.decoder):
                output = "vocabulary" if name == "vocabulary" else "hidden"
                if output in needs:
                    parts.append(f"decoder.{name}")
        return parts

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


def check_outputs(needs: Collection[str]) -> None:
    """Raises `ValueError` for a name that is no output of a forward pass."""
    for name in needs:
        check_choice("an output of a forward pass", name, OUTPUTS)


def _children(module: nn.Module) -> list[str]:
    """Names of its modules and parameters that have something to train."""
    return list(dict.fromkeys(name.partition(".")[0] for name, _ in module.named_parameters()))


def _states_of_tokens(states: Tensor, layout: Layout, tokens: Tensor, lengths: Tensor) -> Tensor:
    """States of a text tower in their layout -> (B, L, D) as the tokens (B, L) lie, 0 after the end of each text."""
    grid = layout.unpack(states)
    grid = F.pad(grid, (0, 0, 0, tokens.shape[1] - grid.shape[1]))  # a negative padding cuts
    is_token = torch.arange(tokens.shape[1]) < lengths[:, None]  # (B, L), on the host
    return grid.masked_fill(~to_device(is_token, grid.device)[..., None], 0)
