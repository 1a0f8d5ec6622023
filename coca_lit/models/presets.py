"""Named sizes and vocabularies of CoCa, and a CoCa by such a name: `create_model("coca_vit_b32", cls_mask="legacy")`.
OpenCLIP's spelling of a name, `coca_ViT-B-32`, means the same preset.

Only `create_model` imports torch, so that a command refuses a misspelt name at once.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from coca_lit import extensions
from coca_lit.errors import check_names, suggest

if TYPE_CHECKING:
    from coca_lit.models.coca import CoCa

# The words of captions of the built-in scenes, `coca_lit.data.scenes`. The order is that of the token ids.
_SCENES = (
    "a above and at before below blue bottom by can circle column cross cyan down followed from go goes green "
    "has is it large left of on orange picture pink preceded purple reach read red right ring row see shows "
    "small square star starts that the then there to top triangle underneath we with yellow"
)
VOCABULARIES = {"scenes": _SCENES.split()}

# OpenCLIP's two released models. 12 text layers and 12 decoder layers are the defaults of `CoCa`.
_B32: dict[str, Any] = {
    "image_encoder": "vit_base_patch32_clip_224",
    "embed_dim": 512,
    "text_width": 512,
    "text_heads": 8,
}
_L14: dict[str, Any] = {
    "image_encoder": "vit_large_patch14_clip_224",
    "embed_dim": 768,
    "text_width": 768,
    "text_heads": 12,
}


def _paper(image_encoder: str, width: int, heads: int, layers: int) -> dict[str, Any]:
    """Table 1 of the CoCa paper: 288 px in patches of 18, cascaded poolers, all parts of one width.

    The depths and widths are the paper's. The vocabulary is CLIP's 49,408 instead of 64,000, and as in OpenCLIP each
    cross-attention has an MLP of its own, so the parameter counts differ from the paper's 383 M, 787 M and 2.1 B.
    """
    return {
        "image_encoder": image_encoder,
        "image_encoder_args": {"patch_size": 18},
        "image_size": 288,
        "embed_dim": width,
        "pooler": "cascade",
        "text_width": width,
        "text_heads": heads,
        "text_layers": layers,
        "decoder_layers": layers,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "coca_vit_b32": _B32,
    "coca_vit_l14": _L14,
    "clip_vit_b32": _B32 | {"decoder_layers": 0, "pooler_queries": 1},
    "coca_base": _paper("vit_base_patch16_clip_224", 768, 12, 12),
    "coca_large": _paper("vit_large_patch14_clip_224", 1024, 16, 12),
    "coca_2b": _paper("vit_giant_patch14_clip_224", 1408, 16, 18),
    # For a few thousand photos: a small convolutional encoder with ImageNet weights, small text side, CLIP's
    # vocabulary.
    "coca_efficientnet": {
        "image_encoder": "tf_efficientnet_lite0",
        "embed_dim": 256,
        "pooler_queries": 37,
        "pooler_heads": 4,
        "context_length": 40,
        "text_width": 256,
        "text_layers": 2,
        "text_heads": 4,
        "decoder_layers": 3,
    },
    # Learns the built-in scenes on two CPU cores in minutes.
    "coca_tiny": {
        "image_encoder": "resnet10t",
        "image_encoder_args": {"channels": [32, 64, 96, 128], "output_stride": 8},
        "image_size": 32,
        "embed_dim": 96,
        "pooler_queries": 33,
        "pooler_heads": 3,
        "tokenizer": "scenes",
        "context_length": 24,
        "text_width": 96,
        "text_layers": 2,
        "text_heads": 3,
        "decoder_layers": 2,
    },
}

# Sizes of LAION's scaling study (arXiv 2506.04598): width and depth of the image
# tower, width and depth of the text side. B/16 has the larger text side.
_SIZES = {
    "s": (384, 12, 384, 12),
    "m": (512, 12, 512, 12),
    "b": (768, 12, 512, 12),
    "b16": (768, 12, 768, 12),
    "l": (1024, 24, 768, 12),
    "h": (1280, 32, 1024, 24),
}
STUDY_SIZES = ("s", "m", "b", "l", "h")
STUDY_PATCHES = (32, 16, 14)


def size_of_study(size: str, patch: int) -> dict[str, Any]:
    """The arguments of a size of LAION's scaling study that all of its captioners share.

    Args:
        size: of `STUDY_SIZES`.
        patch: of `STUDY_PATCHES`, side in pixels.
    """
    width, depth, text_width, text_layers = _SIZES.get(f"{size}{patch}", _SIZES[size])
    head_width = 80 if size == "h" else 64
    return {
        "image_encoder": "vit_base_patch32_clip_224",
        "image_encoder_args": {
            "patch_size": patch,
            "embed_dim": width,
            "depth": depth,
            "num_heads": width // head_width,
        },
        "embed_dim": text_width,
        "text_width": text_width,
        "text_heads": text_width // 64,
        "text_layers": text_layers,
        "decoder_layers": text_layers,
    }


# The 15 sizes of CoCa in that study: coca_ViT-S-32, coca_ViT-H-14, …; coca_vit_b32 and coca_vit_l14 are in `PRESETS`.
STUDY: dict[str, dict[str, Any]] = {
    f"coca_vit_{size}{patch}": size_of_study(size, patch)
    for size in STUDY_SIZES
    for patch in STUDY_PATCHES
    if f"coca_vit_{size}{patch}" not in PRESETS
}


def create_model(
    name: str,
    *,
    imports: Sequence[str] = (),
    **overrides: Annotated[Any, "coca_lit.models.config.CoCaConfig", extensions.MODEL_OPTIONS],
) -> "CoCa":
    """Builds the preset `name`, randomly initialised, with arguments of `CoCa` overridden.

    Args:
        name: a preset of `PRESETS`, `STUDY` or a project, such as coca_vit_b32, see `preset`.
        imports: modules that register image encoders or text towers.
        overrides: arguments of `CoCa`; None leaves the value of the preset. `image_encoder_args` are added to the
            preset's, but another image encoder gets none of those. `tokenizer` may also name one of `VOCABULARIES`
            or of those that projects declare, or be {file: tokenizer.json, start: TOKEN, end: TOKEN, pad: TOKEN}.

    Raises:
        ValueError: unknown preset or unknown argument; the message suggests the nearest one.
        DataError: the file of a tokenizer cannot be read.
    """
    from coca_lit.models.coca import CoCa
    from coca_lit.models.config import CoCaConfig
    from coca_lit.models.registry import import_modules

    check_names("CoCa", overrides, CoCaConfig.names())
    given = {key: value for key, value in overrides.items() if value is not None}
    defaults = preset(name)
    arguments = defaults | given
    if arguments["image_encoder"] == defaults["image_encoder"]:  # the preset's arguments belong to its encoder
        own = defaults.get("image_encoder_args") or {}
        arguments["image_encoder_args"] = own | given.get("image_encoder_args", {})
    else:
        arguments["image_encoder_args"] = given.get("image_encoder_args")
    import_modules(imports)
    arguments["tokenizer"] = _tokenizer(arguments.get("tokenizer", "clip"))
    return CoCa(**arguments)


def _tokenizer(chosen: Any) -> Any:
    """The argument of `CoCa` for a tokenizer that is chosen by name, by its file, or as such."""
    from coca_lit.tokenizer import BYTE_PAIRS, pack

    if isinstance(chosen, Mapping) and "file" in chosen:
        named = {str(key): str(value) for key, value in chosen.items()}
        return {"packed": pack(Path(named.pop("file")).expanduser()), **named}
    if not isinstance(chosen, str) or chosen in BYTE_PAIRS:
        return chosen
    if chosen in VOCABULARIES:
        return VOCABULARIES[chosen]
    of_projects = extensions.declared("vocabularies")
    if chosen in of_projects:
        return extensions.load(of_projects[chosen])
    names = [*BYTE_PAIRS, *VOCABULARIES, *of_projects]
    expected = f"Expected {', '.join(names)}, a list of words or a file"
    raise ValueError(f"unknown tokenizer '{chosen}'{suggest(chosen, names)} {expected}")


def preset(name: str) -> dict[str, Any]:
    """The arguments of a preset by its name in any case, with or without - and _.

    Raises:
        ValueError: there is none; the message suggests the nearest one.
    """
    letters = _letters(str(name))
    own = PRESETS | STUDY
    for known, arguments in own.items():
        if _letters(known) == letters:
            return arguments
    of_projects = extensions.declared("presets")
    for known, dictionary in of_projects.items():
        if _letters(known) == letters:
            arguments = extensions.load(dictionary)[known]
            return arguments
    names = [*own, *of_projects]
    nearest = suggest(str(name), names)
    listed = f" The presets: {', '.join(names)}" if nearest == "." else ""
    raise ValueError(f"unknown model '{name}'{nearest}{listed}")


def _letters(name: str) -> str:
    return re.sub("[-_]", "", name.lower())
