"""CoCa: one network that embeds images and texts in a common space and captions images (arXiv 2205.01917).

images ─ ImageEncoder ─ ImagePooling ─┬─ contrastive vector ─ projection ─ image features ─┐
                                      └─ image tokens ──────────────┐                      ├─ contrastive loss
tokens ─ TextTower ───────────────────┬─ CLS ─ projection ─ text features ─────────────────┘
                                      └─ token states ─ Decoder ────┴─ next-token logits ──── caption loss
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from coca_lit.errors import check_number
from coca_lit.models.generation.generate import write_captions
from coca_lit.models.generation.state import DecodingStep, static_step
from coca_lit.models.image import Pooler, build_image_encoder, build_pooling
from coca_lit.models.init import init_projection
from coca_lit.models.packing import expect_to_fit, expect_tokens, text_lengths, to_device
from coca_lit.models.parts import Freezable
from coca_lit.models.patches import Images
from coca_lit.models.preprocessing import Interpolation, Preprocessing, ResizeMode, preprocessing
from coca_lit.models.registry import IMAGE_ENCODERS, TEXT_TOWERS
from coca_lit.models.text import ClsMask, Decoder, GradCheckpointing, build_text_tower, expect_decoder
from coca_lit.tokenizer import CONTEXT_LENGTH, get_tokenizer

Contrastive = Literal["softmax", "siglip"]

# Defaults of the arguments that files of earlier versions lack. They are left out of `config`, so that the fingerprint
# of an older model stays the same.
LATER: dict[str, Any] = {"interpolation": "bicubic", "resize_mode": "shortest"} | dict.fromkeys(
    ("text_tower", "text_tower_args", "decoder_args")
)
SIZES = (  # arguments that are whole numbers of at least 1
    *("image_size", "embed_dim", "pooler_queries", "pooler_heads"),
    *("context_length", "text_width", "text_layers", "text_heads"),
)
IGNORED_LABEL = -100
RECOMPILE_LIMIT = 32  # graphs of a block
MAX_LOGIT_SCALE = 4.605170185988092  # ln 100, the bound that CLIP puts on the temperature


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
            raise ValueError(
                "this output has no caption logits: the model has no decoder, or captioning was switched off"
            )
        return F.linear(self.hidden, self.vocabulary)

    def log_likelihoods(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """log p(text | image) (T,) of the texts in nats, summed over their tokens after the start without words that
        the vocabulary lacks, and the number of these tokens (T,).

        Args:
            lengths: (T,) number of tokens of each text, on the host.
        """
        logits, labels = self.logits.float(), self.labels
        assert labels is not None  # there are logits
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED_LABEL)  # (N,)
        text = to_device(torch.arange(len(lengths)).repeat_interleave(lengths - 1), losses.device)  # (N,)
        totals = losses.new_zeros(len(lengths)).index_add(0, text, -losses)
        return totals, torch.zeros_like(totals).index_add(0, text, (labels != IGNORED_LABEL).float())


class CoCa(Freezable):
    """Contrastive captioner.

    Args:
        image_encoder: name of a timm model or of an encoder registered with `register_image_encoder`, such as "naflex"
            for images of any shape, see `NaFlexEncoder`.
        image_encoder_args: its arguments (depth, embed_dim, …; for a vision transformer `patch_drop_rate`, the share of
            patches that each training step leaves out).
        image_size: side of the square input in pixels. Images of any shape have as many patches as that square.
        embed_dim: width of the common space and of the image tokens.
        pooler: single | parallel | cascade, see `ImagePooling`; openclip_parallel | openclip_cascade, see
            `OpenClipCascade`; masked_parallel | masked_cascade, of naflex, see `MaskedCascade`; mean | mean_all,
            without and with the class token, see `MeanPooling`.
        pooler_queries: learned queries of the (generative) pooler.
        pooler_heads: attention heads of the poolers.
        tokenizer: "clip", "r50k" (GPT-2's byte pairs) or a word list, for `get_tokenizer`; it defines vocabulary and
            special ids.
        context_length: tokens of a text at most, start and end included.
        cls_mask: correct | legacy, see `TextTower`.
        text_width, text_layers, text_heads: sizes of the text tower; the decoder has its width and heads.
        decoder_layers: pairs of self- and cross-attention blocks; 0 builds a CLIP with the same towers.
        dropout: of the text tower and the decoder.
        contrastive: softmax (CLIP), or siglip, which adds a learned bias to the temperature.
        tied_embeddings: whether the vocabulary projection is the token embedding (Press and Wolf 2017).
        text_tower: name of a tower registered with `register_text_tower`; None for `TextTower`, "modern" for
            `ModernTextTower`, "two_pass" for MaMMUT's `TwoPassTower`.
        text_tower_args: arguments of a registered tower in addition to `TextTower`'s.
        decoder_args: further arguments of the decoder that goes with the text tower, see its `make_decoder`.
        interpolation, resize_mode: how images are resized to `image_size`, see `build_transform`. They do not change
            the network, but travel with its weights, which were trained on such pixels.
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
        interpolation: Interpolation = "bicubic",
        resize_mode: ResizeMode = "shortest",
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        for name in ("image_encoder_args", "text_tower_args", "decoder_args"):
            _expect_plain(name, arguments[name])
        for name in SIZES:
            check_number(name, arguments[name], whole=True, at_least=1)
        check_number("decoder_layers", decoder_layers, whole=True, at_least=0)
        check_number("dropout", dropout, at_least=0, at_most=1)
        for name, kinds in (("contrastive", get_args(Contrastive)), ("cls_mask", get_args(ClsMask))):
            if arguments[name] not in kinds:
                raise ValueError(f"{name} must be {' or '.join(map(repr, kinds))}, got '{arguments[name]}'")
        if decoder_layers and pooler == "single" and pooler_queries < 2:
            raise ValueError(
                "the single pooler needs at least 2 queries: one for the contrastive vector, the rest for the decoder"
            )
        self.tokenizer = get_tokenizer(tokenizer, context_length)
        self.image_encoder = build_image_encoder(image_encoder, image_size, **(image_encoder_args or {}))
        self.pooling = build_pooling(pooler, self.image_encoder, embed_dim, pooler_queries, pooler_heads, text_width)
        self.image_projection: nn.Module = nn.Identity()
        if self.pooling.projected:
            self.image_projection = nn.Linear(self.pooling.vector_width, embed_dim, bias=False)
        sizes = (context_length, text_width, text_layers, text_heads, embed_dim)
        text_arguments = (self.tokenizer.vocab_size, *sizes, cls_mask, dropout)
        self.text = build_text_tower(text_tower, *text_arguments, **(text_tower_args or {}))
        self.text.pad_id = self.tokenizer.pad_id
        self.decoder: Decoder | None = None
        if decoder_layers:
            width = self.pooling.token_width
            self.decoder = self.text.make_decoder(width, decoder_layers, text_heads, dropout, **(decoder_args or {}))
        if tied_embeddings and self.decoder is not None:
            self.decoder.vocabulary.weight = self.text.token_embedding.weight
        # One dimension, not zero: sharding engines split along the first.
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1)) if contrastive == "siglip" else None
        self.preprocessing: Preprocessing = preprocessing(image_size, interpolation, resize_mode)
        self.preprocessing.update(self.image_encoder.preprocessing)  # type: ignore[typeddict-item]
        # Plain values that build this model again; they are stored in every checkpoint.
        config = arguments | {
            "image_encoder": IMAGE_ENCODERS.spec(image_encoder),
            "image_encoder_args": dict(image_encoder_args or {}),
            "tokenizer": self.tokenizer.spec,
            "text_tower": text_tower and TEXT_TOWERS.spec(text_tower),
        }
        self.config = {key: value for key, value in config.items() if key not in LATER or value != LATER[key]}
        self.static_step: DecodingStep | None = None  # see `compile_generation`
        self.static_buffers: dict[Any, list[Tensor]] = {}
        self.init_parameters()

    def init_parameters(self) -> None:
        """Overwrites all parameters with initial values."""
        self.image_encoder.init_parameters()
        self.pooling.init_parameters()
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

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def forward(
        self,
        images: Images | None,
        tokens: Tensor,
        lengths: Tensor | None = None,
        *,
        contrastive: bool = True,
        captioning: bool = True,
        prefix_lengths: Tensor | None = None,
        read: Tensor | None = None,
        on_text_features: Callable[[Tensor], None] | None = None,
    ) -> CoCaOutput:
        """Features and caption states of a batch of pairs.

        Args:
            images: (B, 3, H, W), uint8, or normalised floats, or `Patches`; or what the image encoder or its
                `frozen_part` makes of them. None: texts alone, which have no features and pass the decoder without its
                cross blocks, as in a language model.
            tokens: (B, L) ids, padded at the end to any L. Without the contrastive part there may be several texts of
                each image, side by side.
            lengths: (B,) number of real tokens; None finds them from the trailing pads. On the host: to copy them
                there, or to find them, the host has to wait for the device.
            contrastive, captioning: whether to compute what that loss needs; the output is None where it is off.
            prefix_lengths: (B,) leading tokens that are not predicted, at least 1 for the start; 1 by default. Also
                on the host.
            read: (B, L) ids from which the tokens are predicted; None for the tokens themselves.
            on_text_features: gets the text features before the images are encoded, to send them to other processes
                meanwhile.
        """
        lengths = self._lengths(tokens, lengths)
        decoder = self.decoder if captioning else None
        if images is None:
            contrastive = False
        elif len(images) != len(tokens) and (contrastive or not len(images) or len(tokens) % len(images)):
            raise ValueError(f"every image needs one text: got {len(images)} images and {len(tokens)} texts")
        states, text_vector, layout = self.text(tokens if read is None else read, lengths, contrastive and read is None)
        if contrastive and read is not None:
            _, text_vector, _ = self.text(tokens, lengths)
        text_features = F.normalize(text_vector, dim=-1) if contrastive else None
        if text_features is not None and on_text_features is not None:
            on_text_features(text_features)
        vector, image_tokens = None, None
        if images is not None:
            vector, image_tokens = self.pooling(self.image_encoder(images), contrastive, decoder is not None)
        hidden, labels = None, None
        if decoder is not None:
            prefix_lengths = None if prefix_lengths is None else prefix_lengths.cpu()
            if image_tokens is not None and len(image_tokens) != len(tokens):
                image_tokens = image_tokens.repeat_interleave(len(tokens) // max(len(image_tokens), 1), dim=0)
            hidden, labels = decoder.caption_states(states, layout, tokens, lengths, image_tokens, prefix_lengths)
            if self.tokenizer.unk_id is not None:  # unknown words are read but never predicted
                labels = labels.masked_fill(labels == self.tokenizer.unk_id, IGNORED_LABEL)
        return CoCaOutput(
            image_features=F.normalize(self.image_projection(vector), dim=-1) if contrastive else None,
            text_features=text_features,
            logit_scale=self.logit_scale.exp(),
            hidden=hidden,
            labels=labels,
            vocabulary=decoder.vocabulary.weight if decoder else None,
            logit_bias=self.logit_bias,
        )

    def predicted_tokens(self, tokens: Tensor, lengths: Tensor, prefix_lengths: Tensor) -> Tensor:
        """Number of tokens that the caption loss averages over: all after the prefix, without unknown words."""
        positions, lengths, prefix_lengths = torch.arange(tokens.shape[1]), lengths.cpu(), prefix_lengths.cpu()
        predicted = (positions >= prefix_lengths[:, None]) & (positions < lengths[:, None])  # (B, L), on the host
        predicted = to_device(predicted, tokens.device)
        return (predicted if self.tokenizer.unk_id is None else predicted & (tokens != self.tokenizer.unk_id)).sum()

    def encode_image(self, images: Images, normalize: bool = True) -> Tensor:
        """images (B, 3, H, W) -> image features (B, E), of unit length unless `normalize` is off."""
        vector, _ = self.pooling(self.image_encoder(images), captioning=False)
        features = self.image_projection(vector)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, lengths: Tensor | None = None, normalize: bool = True) -> Tensor:
        """tokens (B, L) -> text features (B, E), of unit length unless `normalize` is off."""
        _, features, _ = self.text(tokens, self._lengths(tokens, lengths))
        return F.normalize(features, dim=-1) if normalize else features

    def log_likelihood(self, images: Images, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """log p(text | image) (T,) of texts (T, L), in nats: the sum over their tokens after the start, without words
        that the vocabulary lacks.

        Args:
            images: (B, 3, H, W) or tokens of the image encoder (B, S, C); T / B texts side by side for each.
        """
        expect_decoder(self.decoder)
        lengths = self._lengths(tokens, lengths)
        return self(images, tokens, lengths, contrastive=False).log_likelihoods(lengths)[0]

    def multimodal_state(self, images: Images, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The decoder's state (B, D) at the last token of each text (B, L): it has seen the image and all the text."""
        decoder = expect_decoder(self.decoder)
        lengths = self._lengths(tokens, lengths)
        _, image_tokens = self.pooling(self.image_encoder(images), contrastive=False)
        states, _, layout = self.text(tokens, lengths, contrastive=False)
        return layout.gather_at(decoder(states, image_tokens, layout), lengths - 1)

    generate = write_captions  # its options: coca_lit/models/generation/options.py

    def compile_generation(self, **options: Any) -> None:
        """Makes `generate` work with static shapes and a step compiled by `torch.compile(**options)`, once for each
        number of captions in a batch and each `max_length`: worth it for many batches of one size.
        """
        self.static_step, self.static_buffers = torch.compile(static_step, fullgraph=True, **options), {}

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

    def set_grad_checkpointing(self, kind: GradCheckpointing = "blocks") -> None:
        """Sets what the backward pass recomputes instead of keeping it.

        blocks: every transformer block, for about a third more time. cross_attention: the decoder's cross blocks, whose
        keys and values of the image tokens are the largest tensors that short captions leave, for about 6 % more.
        """
        if kind not in get_args(GradCheckpointing):
            raise ValueError(
                f"grad_checkpointing must be one of {', '.join(get_args(GradCheckpointing))}, got {kind!r}"
            )
        self.image_encoder.set_grad_checkpointing(kind == "blocks")
        for part in (self.text, self.decoder):
            if part is not None:
                part.grad_checkpointing = kind

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Runs every transformer block through `torch.compile`, in place: names in checkpoints stay the same.

        Equal blocks share their code, and what depends on the lengths of the captions stays outside, so there are a
        few compilations in the first steps (the second length makes it a variable) and none after: one for each kind
        of text, packed or padded, with a mask or without, in training and in validation, which is more than the eight
        that PyTorch allows a function.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        of_image = (module for module in self.image_encoder.modules() if isinstance(module, Block))
        of_decoder = self.decoder.layers() if self.decoder is not None else []
        for block in (*of_image, *self.text.blocks, *(module for layer in of_decoder for module in layer)):
            block.compile(backend=backend)

    # Files are the business of layers above this one; these methods reach them by the package's own interface.

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "CoCa":
        """As `coca_lit.load_model`; "ORG/REPO" is a repository of the Hugging Face Hub, too."""
        import coca_lit

        return coca_lit.from_pretrained(name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes weights, architecture and a model card into a folder: `coca_lit.save_pretrained`."""
        import coca_lit

        coca_lit.save_pretrained(self, folder)

    def push_to_hub(self, repo: str, private: bool = False) -> str:
        """Uploads the same to "ORG/REPO" and returns the name that loads it: `coca_lit.push_to_hub`."""
        import coca_lit

        return coca_lit.push_to_hub(self, repo, private)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keeps the temperature in CLIP's range: a scale between 1 and 100."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def _lengths(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        """(B,), on the host."""
        expect_tokens(tokens)
        lengths = (text_lengths(tokens, self.tokenizer.pad_id) if lengths is None else lengths).cpu()
        if tokens.shape[1] > self.text.context_length:
            expect_to_fit(int(lengths.max()), self.text.context_length)
        return lengths


def _expect_plain(name: str, value: Any) -> None:
    """Raises `ValueError` unless a checkpoint can store the value of this argument."""
    if isinstance(value, dict):
        for key, child in value.items():
            _expect_plain(f"{name}.{key}", child)
    elif isinstance(value, list | tuple):
        for child in value:
            _expect_plain(name, child)
    elif not isinstance(value, str | int | float | None):
        raise ValueError(
            f"{name} must be plain numbers and texts, as checkpoints store them (a layer by its name, such as 'silu'),"
            f" got {value!r}"
        )
