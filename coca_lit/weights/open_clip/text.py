"""CoCa's own text tower and decoder in OpenCLIP's files."""

from collections.abc import Mapping
from typing import Any

from coca_lit.models.coca import CoCa
from coca_lit.models.text import ClassicDecoder, TextTower
from coca_lit.weights.open_clip.config_keys import DECODER_KEYS, FILE, TEXT_KEYS, OpenClipConfig, count
from coca_lit.weights.open_clip.parts import Renaming, Tensors, TextPart, depth

SELF_BLOCK = {
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "attention.qkv.": "attn.in_proj_",
    "attention.out": "attn.out_proj",
    "mlp.0": "mlp.c_fc",
    "mlp.2": "mlp.c_proj",
}
CROSS_BLOCK = {**SELF_BLOCK, "norm_context": "ln_1_kv"}
ALLOWED = {
    "text_cfg": {**TEXT_KEYS, "pool_type": None, "correct_cls_mask": (True, False)},  # its features come from CLS
    "multimodal_cfg": DECODER_KEYS,
}
VERSIONS = {"3.3": "`open_clip_torch` 3.3 or newer", **TextPart.versions}


class ClassicText(TextPart):
    kinds = (TextTower,)
    versions = VERSIONS
    names = (
        Renaming("text.blocks.", "text.transformer.resblocks.", SELF_BLOCK),
        Renaming("text.position_embedding", "text.positional_embedding"),
        Renaming("text.cls_embedding", "text.cls_emb"),
        Renaming("text.norm.", "text.ln_final."),
        Renaming("text.projection.weight", "text.text_projection"),
        Renaming("text.token_embedding.", "text.token_embedding."),
        Renaming("decoder.self_blocks.", "text_decoder.resblocks.", SELF_BLOCK),
        Renaming("decoder.cross_blocks.", "text_decoder.cross_attn.", CROSS_BLOCK),
        Renaming("decoder.norm.", "text_decoder.ln_final."),
        Renaming("decoder.vocabulary.weight", "text_decoder.text_projection"),
    )
    transposed = ("text.text_projection", "text_decoder.text_projection")
    allowed = ALLOWED
    models = ("coca_ViT-L-14",)

    def arguments(self, theirs: Tensors) -> dict[str, Any]:
        return {
            "context_length": len(theirs["text.positional_embedding"]) - 1,
            "cls_mask": "legacy",
            "text_layers": depth(theirs, "text.transformer.resblocks"),
            "decoder_layers": depth(theirs, "text_decoder.resblocks"),
        }

    def shown(self, arguments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {
            "text_cfg": {
                "context_length": arguments["context_length"],
                "width": arguments["text_width"],
                "layers": arguments["text_layers"],
            }
        }

    def configured(self, config: OpenClipConfig, arguments: Mapping[str, Any]) -> dict[str, Any]:
        mask = "correct" if config.text.get("correct_cls_mask") else "legacy"
        own = config.own.get("cls_mask", mask)
        if "correct_cls_mask" in config.text and own != mask:
            raise ValueError(
                f"{FILE} names two CLS masks: text_cfg.correct_cls_mask stands for {mask!r}, coca_lit.cls_mask is"
                f" {own!r}"
            )
        return {"text_heads": heads_of(config, arguments), "cls_mask": own}

    def sections(self, model: CoCa, version: str) -> dict[str, dict[str, Any]]:
        text = {**text_keys(model), "embed_cls": True}
        if version != "3.3":  # which stops at the key
            text["correct_cls_mask"] = model.config.cls_mask == "correct"
        sections = {"text_cfg": text | model.tokenizer.open_clip_config}
        if isinstance(model.decoder, ClassicDecoder):
            sections["multimodal_cfg"] = decoder_keys(model)
        return sections


def heads_of(config: OpenClipConfig, arguments: Mapping[str, Any]) -> int:
    """The number of heads of text tower and decoder; raises `ValueError` unless both have as many."""
    text_heads = count(config.text, "heads", 8)  # these defaults are OpenCLIP's
    decoder_heads = count(config.decoder, "heads", 8 if arguments["decoder_layers"] else text_heads)
    if text_heads != decoder_heads:
        raise ValueError(
            f"{FILE}: text tower and decoder have {text_heads} and {decoder_heads} heads, expected as many"
        )
    return text_heads


def crossed_every(config: OpenClipConfig, arguments: Mapping[str, Any]) -> int:
    """Every how many layers the decoder looks at the image. Several numbers can fit the same tensors.

    Args:
        arguments: with the smallest number that fits, as `decoder_args`.

    Raises:
        ValueError: by the config, other layers look at the image than the tensors show.
    """
    every = count(config.decoder, "cross_attn_ratio", 1)
    shown = arguments["decoder_args"]["cross_attention_every"]
    layers = range(arguments["decoder_layers"])
    if len(layers[::every]) != len(layers[::shown]):
        raise ValueError(
            f"{FILE} belongs to other weights: by its cross_attn_ratio {every}, {len(layers[::every])} of {len(layers)}"
            f" layers look at the image, and in the tensors {len(layers[::shown])} do"
        )
    return every


def text_keys(model: CoCa) -> dict[str, Any]:
    """The keys of a text tower that all kinds have."""
    return {**_shared_keys(model), "layers": model.config.text_layers, "output_tokens": model.decoder is not None}


def decoder_keys(model: CoCa) -> dict[str, Any]:
    """The keys of a decoder that all kinds have."""
    return {**_shared_keys(model), "layers": model.config.decoder_layers}


def _shared_keys(model: CoCa) -> dict[str, Any]:
    config = model.config
    ids = {key: value for key, value in model.tokenizer.open_clip_config.items() if key.endswith("_id")}
    return {
        "context_length": config.context_length,
        "vocab_size": model.tokenizer.vocab_size,
        "width": config.text_width,
        "heads": config.text_heads,
        **ids,
    }
