"""The arguments of a CoCa. This module needs no torch, so that a command refuses a misspelt one soon."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self, get_args

from coca_lit import extensions
from coca_lit.errors import check_choice, check_number
from coca_lit.tokenizer import CONTEXT_LENGTH

Contrastive = Literal["softmax", "siglip"]
ClsMask = Literal["correct", "legacy"]
Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "longest", "squash"]

SIZES = (  # arguments that are whole numbers of at least 1
    *("image_size", "embed_dim", "pooler_queries", "pooler_heads"),
    *("context_length", "text_width", "text_layers", "text_heads"),
)


@dataclass(frozen=True)
class CoCaConfig:
    """The arguments of `CoCa`, plain values that build the same network again. Every checkpoint holds them (`stored`).

    Args:
        image_encoder: name of a timm model, of an encoder of a project, or of one registered with
            `register_image_encoder`.
        image_encoder_args: its arguments (depth, embed_dim, …; for a vision transformer `patch_drop_rate`, the share of
            patches that each training step leaves out).
        image_size: side of the square input in pixels; an encoder of another kind of input says what it means there.
        embed_dim: width of the common space and of the image tokens.
        pooler: single, see `SinglePooling`; parallel | cascade, see `TwoPoolers`; openclip_parallel | openclip_cascade,
            see `OpenClipPooling`; or one of a project or registered with `register_pooler`.
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
        text_tower: name of a tower of a project, or registered with `register_text_tower`; None for `TextTower`.
        text_tower_args: arguments of a registered tower in addition to `TextTower`'s.
        decoder_args: further arguments of the decoder that goes with the text tower, see its `make_decoder`.
        interpolation, resize_mode: how images become `image_size`, see `build_transform`. They travel with the weights.
        options: how other kinds of input are taken, by the names that projects declare, see `ModelOption`; only what
            differs from the default. For `CoCa`, commands and checkpoints each is an argument like those above.

    Raises:
        ValueError: values that cannot work, or that a checkpoint could not store.
    """

    image_encoder: str = "vit_base_patch32_clip_224"
    image_encoder_args: dict[str, Any] | None = None
    image_size: int = 224
    embed_dim: int = 512
    pooler: str = "single"
    pooler_args: dict[str, Any] | None = None
    pooler_queries: int = 256
    pooler_heads: int = 8
    tokenizer: str | Sequence[str] | Mapping[str, str] = "clip"
    context_length: int = CONTEXT_LENGTH
    cls_mask: ClsMask = "correct"
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    decoder_layers: int = 12
    dropout: float = 0.0
    contrastive: Contrastive = "softmax"
    tied_embeddings: bool = False
    text_tower: str | None = None
    text_tower_args: dict[str, Any] | None = None
    decoder_args: dict[str, Any] | None = None
    interpolation: Interpolation = "bicubic"
    resize_mode: ResizeMode = "shortest"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("image_encoder_args", "pooler_args", "text_tower_args", "decoder_args"):
            value = getattr(self, name)
            try:
                json.dumps(value)
            except TypeError as error:
                raise ValueError(f"{name} must be plain numbers and texts, got {value!r}: {error}") from error
        for name in SIZES:
            check_number(name, getattr(self, name), whole=True, at_least=1)
        check_number("decoder_layers", self.decoder_layers, whole=True, at_least=0)
        check_number("dropout", self.dropout, at_least=0, at_most=1)
        check_choice("contrastive", self.contrastive, get_args(Contrastive))
        check_choice("cls_mask", self.cls_mask, get_args(ClsMask))

    @classmethod
    def names(cls) -> list[str]:
        """The names of all arguments, with the options that projects declare."""
        return [name for name in cls.__dataclass_fields__ if name != "options"] + [*extensions.model_options()]

    def changed(self, **arguments: Any) -> Self:
        """With other values of some arguments, options included."""
        options = dict(self.options)
        for name, option in extensions.model_options().items():
            if name in arguments:
                options[name] = arguments.pop(name)
                if options[name] == option.default:
                    del options[name]
        return replace(self, options=options, **arguments)

    def stored(self) -> dict[str, Any]:
        """All arguments by name, as a checkpoint holds them."""
        arguments = asdict(self)
        options = arguments.pop("options")
        return arguments | options
