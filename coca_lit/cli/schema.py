"""What a config may say: the constructors are the schema, and `conf/` for what no constructor takes."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml
from omegaconf import OmegaConf

from coca_lit.cli.signatures import Argument, read_signature
from coca_lit.errors import ConfigError, suggest

HYDRA_KEYS = ("_target_", "_args_", "_partial_", "_convert_", "_recursive_")  # that `instantiate` reads itself
NUMBERS = {"int", "float", "bool"}
AUTO = "auto"  # a recipe chooses the value, see `coca_lit.training.recipe`


class MissingValueError(ConfigError):
    """A key without a default that nobody set."""


def check(node: Mapping[str, Any], shipped: Mapping[str, Any], groups: Iterable[str] = ()) -> None:
    """Compares a config with the signatures of all its targets, and the rest of it with the config as shipped.

    Args:
        node, shipped: plain values, with interpolations as they stand.
        groups: names of config groups, to suggest.

    Raises:
        ConfigError: a key that nobody takes, or a value of another type than is expected.
    """
    for key, value, argument in _walk(node, shipped):
        if argument is None:
            while isinstance(value, dict) and len(value) == 1:  # to the innermost key
                ((name, value),) = value.items()
                key = f"{key}.{name}"
            names = dict.fromkeys([*_names(shipped), *_names(node), *groups])
            known = [name for name in names if not f"{name}.".startswith(f"{key}.") and not key.startswith(f"{name}.")]
            leaves = {name.rpartition(".")[2]: name for name in sorted(known, key=lambda name: -name.count("."))}
            raise ConfigError(f"there is no key '{key}'{suggest(key, known, leaves)}")
        if wrong := _mistake(value, argument):
            raise ConfigError(f"{key} must be {wrong}, got {written(value)}")


def _walk(node: Mapping[str, Any], shipped: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value, argument) of all values; the argument is None for a key that nobody takes.

    Args:
        shipped: the node as shipped; empty inside of an argument, where any key is free.
    """
    # Parts such as callbacks: any name, for something to build.
    is_parts = {type(value) for value in shipped.values()} in ({dict}, {dict, type(None)})
    known, takes_any = _known(node, shipped)
    for key, value in node.items():
        name, before = f"{path}{key}", shipped.get(key)
        if is_parts and "_target_" not in node:
            argument = Argument() if value is None or (isinstance(value, dict) and "_target_" in value) else None
        else:
            argument = known.get(key, Argument() if takes_any else None)
        yield name, value, argument
        inner = before if isinstance(before, dict) and ("_target_" not in node or "_target_" in before) else {}
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, dict):
                yield from _walk(child, inner, f"{name}.")


def _known(node: Mapping[str, Any], shipped: Mapping[str, Any]) -> tuple[dict[str, Argument], bool]:
    """What may stand in a node: the arguments of its target, and what is shipped beside them for somebody else, such as
    `trainer.micro_batch_size`; and whether anything else may, too.
    """
    listed = {key: Argument(type(value).__name__, value) for key, value in shipped.items()}
    if "_target_" not in node:
        return listed, not shipped
    signature, before = read_signature(node["_target_"]), read_signature(shipped.get("_target_"))
    beside = {key: listed[key] for key in listed.keys() - before.arguments.keys()} if before is not None else {}
    if signature is None:
        return beside, True
    return dict.fromkeys(HYDRA_KEYS, Argument()) | signature.arguments | beside, signature.takes_any


def _names(node: Any, path: str = "") -> list[str]:
    """All keys of a config, and those that its constructors take."""
    if not isinstance(node, dict):
        return []
    signature = read_signature(node.get("_target_"))
    own = dict.fromkeys([*node, *(signature.arguments if signature is not None else ())])
    return [name for key in own for name in (f"{path}{key}", *_names(node.get(key), f"{path}{key}."))]


def _mistake(value: Any, argument: Argument) -> str | None:
    """What is expected in place of a value, in words; None if it may stand there, or if that is hard to say."""
    kinds = {*re.findall(r"[\w.]+", argument.annotation)} - {"Optional", "Union", "None", "NoneType"}
    if value in (None, "???", AUTO) or (isinstance(value, str) and "${" in value) or not kinds:
        return None
    if kinds == {"list"}:
        return "a list" if not isinstance(value, list) else None
    if not kinds <= NUMBERS or (isinstance(value, bool) and "bool" in kinds):
        return None
    if kinds == {"bool"}:
        return "true or false"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or ("float" not in kinds and value % 1):
        return "a number" if "float" in kinds else "a whole number"
    return None


def check_complete(node: Mapping[str, Any], path: str = "") -> None:
    """Raises `MissingValueError` for a value that is still to be given."""
    for key, value in node.items():
        if value == "???":
            raise MissingValueError(f"{path}{key} is missing: set {path}{key}=VALUE")
        if isinstance(value, dict):
            check_complete(value, f"{path}{key}.")


def targets(node: Any) -> list[str]:
    """The names of all that a config builds."""
    children = [*node.values()] if isinstance(node, dict) else node if isinstance(node, list) else []
    own = [str(node["_target_"])] if isinstance(node, dict) and "_target_" in node else []
    return [*own, *(name for child in children for name in targets(child))]


def written(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, float):
        return str(value)  # YAML would write 1.0e-05
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").strip()


def unresolved(cfg: Any) -> Any:
    """A config as plain values, with interpolations as they stand."""
    return OmegaConf.to_container(cfg, resolve=False)
