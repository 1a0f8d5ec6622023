"""OpenCLIP's CLIPs with a vision transformer, and a text transformer at the root of the file or under `text.`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from coca_lit.weights.open_clip.config_keys import DECODER_KEYS, TEXT_KEYS, count, model_section, read_config
from coca_lit.weights.open_clip.image import ClipTransformer
from coca_lit.weights.open_clip.parts import Renaming, Tensors, depth, tokenizer_of
from coca_lit.weights.open_clip.poolers import SinglePooler
from coca_lit.weights.open_clip.text import SELF_BLOCK

IMAGE = ClipTransformer()
NAMES = (
    *IMAGE.names,
    Renaming("image_projection.weight", "visual.proj"),
    Renaming("blocks.", "transformer.resblocks.", SELF_BLOCK),
    Renaming("position_embedding", "positional_embedding"),
    Renaming("norm.", "ln_final."),
    Renaming("text_projection.weight", "text_projection"),
    Renaming("token_embedding.", "token_embedding."),
    Renaming("logit_scale", "logit_scale"),
)
TRANSPOSED = ("visual.proj", "text_projection")
_ALLOWED = {
    "vision_cfg": {
        **IMAGE.allowed["vision_cfg"],
        **SinglePooler.allowed["vision_cfg"],
        "ls_init_value": None,  # the tensors show it
    },
    "text_cfg": {**TEXT_KEYS, "pool_type": ("argmax",), "correct_cls_mask": None},
    "multimodal_cfg": DECODER_KEYS,
}


def at_the_root(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a CLIP with its text tower at the root."""
    return {name.removeprefix("text."): tensor for name, tensor in tensors.items() if name != "attn_mask"}


def clip_sizes(theirs: Tensors) -> dict[str, Any]:
    """Arguments of `CLIP` that the tensors show, whose text tower is at the root.

    Raises:
        ValueError: this is not a CLIP, or one with another vocabulary.
    """
    for needed in ("visual.conv1.weight", "visual.proj", "visual.ln_pre.weight", "token_embedding.weight"):
        if needed not in theirs:
            kind = "with a vision transformer and CLIP's own text transformer (ViT-B-32, ViT-L-14, ViT-H-14, …)"
            raise ValueError(f"this is not an OpenCLIP CLIP {kind}: it has no tensor '{needed}'")
    vocab_size, text_width = theirs["token_embedding.weight"].shape
    if tokenizer_of(vocab_size) != "clip":
        raise ValueError(f"the checkpoint has a vocabulary of {vocab_size} tokens; of a CLIP only 49408 can be read")
    image = IMAGE.arguments(theirs)
    del image["image_encoder"]  # it has no other
    return {
        **image,
        "embed_dim": theirs["visual.proj"].shape[1],
        "context_length": len(theirs["positional_embedding"]),
        "text_width": text_width,
        "text_layers": depth(theirs, "transformer.resblocks"),
        "text_heads": max(text_width // 64, 1),
    }


def clip_arguments(config: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `CLIP` that only OpenCLIP's config shows; its defaults are OpenCLIP's.

    Args:
        config: content of `open_clip_config.json`; None shows nothing.
        sizes: the arguments that follow from the tensors.

    Raises:
        ValueError: the config asks for something that CLIP lacks.
    """
    if config is None:
        return {}
    text = {
        "context_length": sizes["context_length"],
        "width": sizes["text_width"],
        "layers": sizes["text_layers"],
    }
    shown = {"model_cfg": {"embed_dim": sizes["embed_dim"]}, **IMAGE.shown(sizes), "text_cfg": text}
    found = read_config(config, model_section(config), _ALLOWED, shown)
    return {
        **IMAGE.configured(found, sizes),
        "text_heads": count(found.text, "heads", 8),
        "quick_gelu": found.quick_gelu,
        "interpolation": found.interpolation,
        "resize_mode": found.resize_mode,
    }
