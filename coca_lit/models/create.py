"""A CoCa by the name of a preset: `create_model("coca_vit_b32", cls_mask="legacy")`."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from coca_lit.errors import check_names, suggest
from coca_lit.models.coca import CoCa
from coca_lit.models.presets import VOCABULARIES, preset
from coca_lit.models.registry import import_modules
from coca_lit.tokenizer import BYTE_PAIRS, pack


def create_model(name: str, *, imports: Sequence[str] = (), **overrides: Annotated[Any, CoCa]) -> CoCa:
    """Builds the preset `name`, randomly initialised, with arguments of `CoCa` overridden.

    Args:
        name: a preset of `PRESETS` or `STUDY`, such as coca_vit_b32, see `preset`.
        imports: modules that register image encoders or text towers.
        overrides: arguments of `CoCa`; None leaves the value of the preset. `image_encoder_args` are added to the
            preset's, but another image encoder gets none of those. `tokenizer` may also name one of `VOCABULARIES`, or
            be {file: tokenizer.json, start: TOKEN, end: TOKEN, pad: TOKEN}.

    Raises:
        ValueError: unknown preset or unknown argument; the message suggests the nearest one.
    """
    check_names("CoCa", overrides, inspect.signature(CoCa).parameters)
    given = {key: value for key, value in overrides.items() if value is not None}
    defaults = preset(name)
    arguments = defaults | given
    if arguments["image_encoder"] == defaults["image_encoder"]:  # the preset's arguments belong to its encoder
        own = defaults.get("image_encoder_args") or {}
        arguments["image_encoder_args"] = own | given.get("image_encoder_args", {})
    else:
        arguments["image_encoder_args"] = given.get("image_encoder_args")
    import_modules(imports)
    tokenizer = arguments.get("tokenizer", "clip")
    if isinstance(tokenizer, Mapping) and "file" in tokenizer:
        named = {str(key): str(value) for key, value in tokenizer.items()}
        arguments["tokenizer"] = {"packed": pack(Path(named.pop("file")).expanduser()), **named}
    elif isinstance(tokenizer, str) and tokenizer in VOCABULARIES:
        arguments["tokenizer"] = VOCABULARIES[tokenizer]
    elif isinstance(tokenizer, str) and tokenizer not in BYTE_PAIRS:
        names = [*BYTE_PAIRS, *VOCABULARIES]
        raise ValueError(
            f"unknown tokenizer '{tokenizer}'{suggest(tokenizer, names)} Expected {', '.join(names)}, a list of words"
            " or a file"
        )
    return CoCa(**arguments)
