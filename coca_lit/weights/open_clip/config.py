"""`open_clip_config.json`: written for a model of ours, and read for what the tensors beside it do not show.

What belongs to a part of the model is said by its `Part`; `config_keys` says which keys may have which values.
"""

from collections.abc import Mapping
from typing import Any

from coca_lit.models.coca import CoCa
from coca_lit.models.image import CLIP_NORMALISATION
from coca_lit.tokenizer import get_tokenizer
from coca_lit.weights.open_clip.config_keys import FILE, Allowed, model_section, read_config
from coca_lit.weights.open_clip.parts import (
    ImagePart,
    PoolerPart,
    Tensors,
    TextPart,
    expect_captioner,
    parts_in,
    parts_of,
    tokenizer_of,
)


def open_clip_config(model: CoCa, version: str = "3.3") -> dict[str, Any]:
    """What `open_clip.create_model("local-dir:…")` needs beside the weights.

    OpenCLIP 3.3 has no key for the CLS mask: it always computes the legacy one. The section `coca_lit`, which it
    ignores, stores the mask that the model was trained with. OpenCLIP 4 has a key, at which 3.3 would stop.

    Args:
        version: of OpenCLIP, one of the `versions` of the text tower's `TextPart`.

    Raises:
        ValueError: OpenCLIP cannot build such a model; the message says why.
    """
    image, pooler, text = described_parts(model, version)
    vision = image.keys(model.image_encoder)
    vision["output_tokens"] = model.decoder is not None
    vision |= pooler.keys(model.pooling)
    model_cfg = {"embed_dim": model.config.embed_dim, "vision_cfg": vision, **text.sections(model, version)}
    if "text_cfg" in model_cfg:
        model_cfg["custom_text"] = True
    if model.logit_bias is not None:
        model_cfg["init_logit_bias"] = -10.0  # it builds the bias only with a value, which the weights replace
    trunk: Any = model.image_encoder.trunk
    preprocess_cfg: dict[str, Any] = {key: list(trunk.pretrained_cfg[key]) for key in CLIP_NORMALISATION}
    preprocess_cfg["interpolation"] = model.preprocessing["interpolation"]
    preprocess_cfg["resize_mode"] = model.preprocessing["resize_mode"]
    config: dict[str, Any] = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    if version == "3.3":
        config["coca_lit"] = {"cls_mask": model.config.cls_mask}
    return config


def described_parts(model: CoCa, version: str) -> tuple[ImagePart, PoolerPart, TextPart]:
    """The parts of a model that OpenCLIP's CoCa can be, whatever its CLS mask.

    Raises:
        ValueError: it cannot; the message says why.
    """
    image, pooler, text = parts_of(model)
    reason: str | None = None
    if model.tokenizer.open_clip_version is None:
        reason = "it has a tokenizer of its own, and OpenCLIP's CoCa reads byte pairs: safetensors and onnx take it"
    elif pooler is None or type(model.pooling) not in pooler.kinds:
        reason = (
            f"it has the {model.config.pooler.rpartition(':')[2]} pooler, and OpenCLIP has the single one, and with"
            " version=4 openclip_parallel and openclip_cascade"
        )
    elif model.pooling.added:
        reason = f"it has {', '.join(model.pooling.added)} for another kind of input, and OpenCLIP has none"
    elif text is None or type(model.text) not in text.kinds:
        reason = f"its text tower is a {type(model.text).__name__}, and OpenCLIP has none"
    elif image is None:
        reason = f"its image encoder is {model.config.image_encoder}, and OpenCLIP has none"
    else:
        reason = (
            pooler.obstacle(model, version)
            or text.obstacle(model, version)
            or _other_version(model, (image, pooler, text), version)
            or image.obstacle(model, version)
            or _other_widths(model)
        )
        if reason is None:
            return image, pooler, text
    raise ValueError(f"OpenCLIP cannot build this model: {reason}")


def _other_version(model: CoCa, parts: tuple[ImagePart, PoolerPart, TextPart], version: str) -> str | None:
    """Why this version of OpenCLIP cannot build the model, if another one can."""
    versions = parts[2].versions
    if version == "3.3" and "4" in (model.tokenizer.open_clip_version, *(part.since for part in parts)):
        return "its pooler, tokenizer, image encoder or text tower needs OpenCLIP 4: export it with version=4"
    if version not in versions:
        return f"version must be {' or '.join(versions)}, got {version}"
    return None


def _other_widths(model: CoCa) -> str | None:
    config = model.config
    if model.decoder is None or config.embed_dim == config.text_width:
        return None
    return (
        f"OpenCLIP's decoder reads image tokens of its own width, and this one reads tokens of {config.embed_dim}"
        f" with a width of {config.text_width}"
    )


def coca_arguments(theirs: Tensors, config: Any) -> dict[str, Any]:
    """The arguments of the `CoCa` that a file holds.

    Args:
        theirs: the tensors of the file.
        config: content of `open_clip_config.json`; None yields what all of OpenCLIP's models of this kind have.

    Raises:
        ValueError: this is no captioner of OpenCLIP, or one that cannot be read; or the config asks for something that
            CoCa lacks.
    """
    parts = expect_captioner(theirs, parts_in(theirs))
    vocab_size, text_width = theirs["text.token_embedding.weight"].shape
    arguments: dict[str, Any] = {
        "text_width": text_width,
        "text_heads": max(text_width // 64, 1),
        "tokenizer": tokenizer_of(vocab_size),
        "contrastive": "siglip" if "logit_bias" in theirs else "softmax",
    }
    image, pooler, text = parts
    # Text before the pooler: OpenCLIP's models with two poolers have another CLS mask.
    for part in (image, text, pooler):
        arguments |= part.arguments(theirs)
    if config is None:
        for part in (text, pooler, image):
            arguments |= part.without_config(arguments)
        return arguments
    shown: dict[str, Mapping[str, Any]] = {"model_cfg": {"embed_dim": arguments["embed_dim"]}}
    allowed: dict[str, Allowed] = {}
    for part in parts:
        shown |= part.shown(arguments)
        for section, keys in part.allowed.items():
            allowed[section] = {**allowed.get(section, {}), **keys}
    tokenizer = get_tokenizer(arguments["tokenizer"])
    for section in ("text_cfg", "multimodal_cfg"):
        written = {key: (value,) for key, value in tokenizer.open_clip_config.items()}
        allowed[section] = {**allowed[section], **written}
    found = read_config(config, text.translated(model_section(config)), allowed, shown)
    for key, what in {**image.required, **pooler.required}.items():
        if key not in found.vision:
            raise ValueError(f"{FILE} lacks vision_cfg.{key}, and the weights have {what}")
    for key in tokenizer.open_clip_config:
        if key not in found.text:
            raise ValueError(f"{FILE} lacks text_cfg.{key}, which the tokenizer {tokenizer.spec} needs")
    if found.quick_gelu:
        raise ValueError("the config asks for QuickGELU, but CoCa is built with GELU")
    arguments["interpolation"] = found.interpolation
    arguments["resize_mode"] = found.resize_mode
    for part in parts:
        arguments |= part.configured(found, arguments)
    return arguments
