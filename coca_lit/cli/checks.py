"""What a config alone shows to be wrong, found before the seconds that PyTorch takes to be imported: unknown
keys, texts and signs where a number belongs, files and folders that are not there.

The constructors check everything again, and more.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from omegaconf import DictConfig, OmegaConf

from coca_lit.errors import ConfigError, DataNotFoundError, suggest

FILES = (
    *("checkpoint", "interpolate_with", "init_from", "ckpt_path", "scoring.clip_score_model"),
    *("init_parts.image_encoder", "init_parts.decoder"),
)
NAMES = ("auto", "builtin", "efficientnet_lite0", "efficientnet_lite2")  # what may stand there besides a model
RENAMED = {  # keys of earlier versions
    "objective": "scoring.objective",
    "image_weights": "init_parts.image_encoder",
    "init_decoder_from": "init_parts.decoder",
    "model.contrastive": "model.net.contrastive",
}
WITHOUT_DATA = "data=scenes needs no files"
NOT_ONLY_NUMBERS = ("trainer.devices",)  # Lightning takes auto and a list of devices, too
WITHOUT_EVALUATION = "scoring.skip_missing=true leaves such evaluations out, evals=[] all of them"


class MissingValueError(ConfigError):
    """A key without a default that nobody set."""


def check(node: Any, defaults: Any, path: str = "") -> None:
    """Compares the part of a config that is read directly, and not built by a constructor, with its defaults.

    Args:
        node, defaults: plain values with interpolations as they stand.

    Raises:
        ConfigError: a key that the defaults lack, a value of another type than the default, or a missing value.
    """
    for key, value in node.items():
        name = f"{path}{key}"
        if key not in defaults:
            raise ConfigError(f"there is no key '{name}'{suggest(key, defaults, RENAMED)}")
        default = defaults[key]
        if value == "???":
            raise MissingValueError(f"{name} is missing: set {name}=VALUE")
        if isinstance(value, str) and "${" in value:
            continue
        if isinstance(default, dict) and isinstance(value, dict):
            if default and not _builds_objects(default):
                check(value, default, f"{name}.")
        elif not _fits(value, default):
            kind = _kind(default)
            raise ConfigError(f"{name} must be {kind}, the default is {written(default)}; got {written(value)}")


def check_scalars(node: Any, defaults: Any, path: str = "", own: bool = False) -> None:
    """Compares the numbers and truth values in all nodes with their defaults.

    Args:
        node, defaults: plain values with interpolations as they stand; the defaults of the options chosen.
        own: the node is an argument of a constructor of coca_lit, none of which takes a negative number where its
            default is not negative.

    Raises:
        ConfigError: something else than a number, or than true or false, stands where the default is one; or a
            negative number.
    """
    for key, value in node.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            if value.get("_target_") == default.get("_target_"):
                ours = str(value["_target_"]).startswith("coca_lit.") if "_target_" in value else own
                check_scalars(value, default, f"{path}{key}.", ours)
            continue
        if value is None or (isinstance(value, str) and "${" in value) or f"{path}{key}" in NOT_ONLY_NUMBERS:
            continue
        kind = None
        if isinstance(default, bool) and not isinstance(value, bool):
            kind = _kind(default)
        elif _is_number(default) and (not _is_number(value) or (own and value < 0 <= default)):
            kind = f"a number{' of at least 0' if own and default >= 0 else ''}"
        if kind is not None:
            raise ConfigError(f"{path}{key} must be {kind}, the default is {written(default)}; got {written(value)}")


def check_places(cfg: DictConfig) -> None:
    """Looks for the files and folders that a config names.

    Raises:
        ConfigError: a file that is named does not exist.
        DataNotFoundError: the folder of the training data or of an evaluation does not exist.
    """
    for key in FILES:
        file = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
        if isinstance(file, str) and file not in NAMES and not Path(file).expanduser().exists():
            from coca_lit.weights.hub import PREFIX, hint, released

            if not file.startswith(PREFIX) and released(file) is None:
                raise ConfigError(f"{key}: there is no checkpoint '{file}'{hint(file)}")
    if _is_ours(cfg.get("data")) and (place := place_of_data(cfg)) is not None:
        _check_folders(place, OmegaConf.select(cfg, place, throw_on_resolution_failure=False), WITHOUT_DATA)
    if not OmegaConf.select(cfg, "scoring.skip_missing", default=True):
        for name, node in cfg.evals.items():
            part = (node.get("records") or node.get("images")) if isinstance(node, DictConfig) else None
            if _is_ours(part) and (place := place_of_evaluation(cfg, name)) is not None:
                _check_folders(place, part.get("root"), WITHOUT_EVALUATION)


def _check_folders(key: str, value: Any, otherwise: str) -> None:
    for place in _places(value):
        parts = re.split(r"[*?\[{]", place, maxsplit=1)  # a pattern of shards
        folder = parts[0] if len(parts) == 1 else parts[0].rpartition("/")[0] or ("/" if place[0] == "/" else ".")
        if "://" not in place and not Path(folder).expanduser().exists():
            raise DataNotFoundError(
                f"{key}: there is no folder '{folder}' (what belongs there: coca_lit/data/README.md); "
                f"set {key}=PLACE to where the data are; {otherwise}"
            )


def _places(value: Any) -> Iterator[str]:
    """The paths in a text, a list or the sources of a mixture."""
    if isinstance(value, str):
        yield value
    elif OmegaConf.is_config(value):
        for part in value.values() if OmegaConf.is_dict(value) else value:
            yield from _places(part)


def place_of_data(cfg: DictConfig) -> str | None:
    """The key that says where the training data are; None if they need no files."""
    return next((f"data.{key}" for key in ("root", "shards") if key in cfg.get("data", ())), None)


def place_of_evaluation(cfg: DictConfig, name: str) -> str | None:
    """The key that says where the data of an evaluation are; None if they need no files."""
    for part in ("records", "images"):
        node = OmegaConf.select(cfg.evals, f"{name}.{part}", throw_on_resolution_failure=False)
        root = unresolved(node).get("root") if OmegaConf.is_dict(node) else None
        if root is not None:
            found = re.fullmatch(r"\$\{roots\.(\w+)\}", str(root))
            if found is None:
                return f"evals.{name}.{part}.root"
            return "data.root" if unresolved(cfg.roots)[found[1]] == "${data.root}" else f"roots.{found[1]}"
    return None


def unresolved(cfg: Any) -> Any:
    """A config as plain values, with interpolations as they stand."""
    return OmegaConf.to_container(cfg, resolve=False)


def written(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, float):
        return str(value)  # YAML would write 1.0e-05
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").strip()


def _builds_objects(node: Any) -> bool:
    return isinstance(node, dict) and ("_target_" in node or any(map(_builds_objects, node.values())))


def _kind(value: Any) -> str | None:
    """The type of a default in words; None where any value may stand."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int):
        return "a whole number"
    if isinstance(value, float):
        return "a number"
    return "a list" if isinstance(value, list) else None


def _fits(value: Any, default: Any) -> bool:
    kinds = (_kind(default), _kind(value))
    return kinds[0] is None or kinds[0] == kinds[1] or kinds == ("a number", "a whole number")


def _is_ours(node: Any) -> TypeGuard[DictConfig]:
    """Whether a function or class of this package is built, whose `root` is a folder."""
    return isinstance(node, DictConfig) and str(node.get("_target_")).startswith("coca_lit.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
