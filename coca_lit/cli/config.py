"""From a composed config to objects: the typed root, and building with checks.

Below the root the constructors are the schema. `build` refuses keys that a constructor does not have, suggests the
right one, and builds nothing whose code lies outside the packages listed here: a config may come from a stranger.
"""

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from coca_lit.errors import ConfigError

# What a run is made of, and no more: elsewhere in these packages are functions that load pickles, that is, run code.
ALLOWED_PACKAGES = (
    "coca_lit",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.pytorch.trainer",
    "torch.optim",
)
# What Hydra itself builds from its own part of a config, before any of our code runs.
HYDRA_PACKAGES = ("coca_lit", "hydra._internal.core_plugins", "hydra.experimental", "hydra_plugins", "optuna.samplers")
LOG_CLASSES = (
    *("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "logging.Formatter"),
    *("logging.handlers.RotatingFileHandler", "colorlog.ColoredFormatter"),
)


@dataclass
class TrainConfig:
    """The keys at the root of a run; `conf/train.yaml` explains them."""

    name: str = MISSING
    output_dir: str | None = MISSING  # None under --cfg, where nothing runs
    seed: int = 0
    threads: int | None = None
    data_dir: str = "data"
    image_size: int = 224
    ckpt_path: str | None = "auto"
    init_from: str | None = None
    vocabulary: int | None = None
    image_weights: str | None = None
    lora: Any = MISSING
    ema: float | None = None
    scoring: Any = MISSING
    objective: str | None = None
    skip_missing: bool = False
    plan: Any = False
    model: Any = MISSING
    data: Any = MISSING
    trainer: Any = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    evals: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)


@dataclass
class EvaluateConfig:
    """The keys at the root of an evaluation; `conf/evaluate.yaml` explains them."""

    checkpoint: str = MISSING
    interpolate_with: str | None = None
    weight: float = 0.5
    quick_gelu: bool | None = None
    name: str = MISSING
    output_dir: str = MISSING
    threads: int | None = None
    data_dir: str = "data"
    image_size: int | None = None
    scoring: Any = MISSING
    spice_jars: str | None = None
    skip_missing: bool = False
    evals: dict[str, Any] = field(default_factory=dict)


def build(node: DictConfig, path: str, **objects: Any) -> Any:
    """Instantiates a config node with Hydra, after checking it; the constructor gets `objects` beside the node's keys.

    Raises:
        ConfigError: a key that the constructor lacks, a target outside the allowed packages, or a value that it
        refuses; says where.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    _check(OmegaConf.to_container(node, resolve=True), path, objects)
    try:
        return instantiate(node, _convert_="all", **objects)
    except InstantiationException as error:
        cause = error.__cause__
        if not isinstance(cause, TypeError | ValueError | ModuleNotFoundError):
            raise cause or error from error
        raise ConfigError(f"{path}: {cause}") from error


def _check(node: Any, path: str, objects: Iterable[str] = ()) -> None:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        _check(child, f"{path}.{key}")
    if isinstance(node, dict) and "_target_" in node:
        target = resolve_target(str(node["_target_"]), path)
        allowed = inspect.signature(target).parameters
        if any(p.kind is p.VAR_KEYWORD for p in allowed.values()):
            return  # such a target checks its keys itself
        for key in [*node, *objects]:
            if key not in allowed and key not in ("_target_", "_partial_", "_convert_"):
                raise ConfigError(f"{path} has no key '{key}'{suggest(key, allowed)} Its keys: {', '.join(allowed)}")


def check_hydra(node: Any, path: str = "hydra") -> None:
    """Refuses a config whose part for Hydra names code from elsewhere: Hydra would run it first of all.

    Args:
        node: plain values with interpolations left as they are; one that stands for code is refused.
    """
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        if key == "_target_":
            resolve_target(str(child), path, HYDRA_PACKAGES)
        elif key in ("class", "()") and "_logging" in path and child not in LOG_CLASSES:
            raise ConfigError(f"{path}: '{child}' is none of the classes for logging: {', '.join(LOG_CLASSES)}")
        else:
            check_hydra(child, f"{path}.{key}")


def resolve_target(target: str, path: str, packages: Sequence[str] = ALLOWED_PACKAGES) -> Callable[..., Any]:
    """The class or function called `target`, if it really lives in an allowed package, whatever name leads to it."""
    if not _allowed(target, packages):
        raise ConfigError(f"{path}: '{target}' is outside the packages that a config may use ({', '.join(packages)})")
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{path}: there is no '{target}' ({error})") from error
    origin = getattr(found, "__module__", None) or ""
    if not callable(found) or not _allowed(f"{origin}.", packages):
        raise ConfigError(
            f"{path}: '{target}' leads to {origin or type(found).__name__}, outside the packages that a config may use"
        )
    return found


def _allowed(name: str, packages: Sequence[str]) -> bool:
    return name.startswith(tuple(f"{package}." for package in packages))


def suggest(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else "."


def explain_override(
    error: Exception, config: Callable[[], DictConfig], options: Callable[[str], Sequence[str]]
) -> str:
    """One sentence for a command line or an experiment file that Hydra refused, with what was probably meant.

    Args:
        config: makes the config whose keys were available.
        options: the options of a config group.
    """
    text = str(error).strip()
    if text.startswith("Error merging override") and error.__cause__ is not None:
        reason = str(error.__cause__).splitlines()[0]
        return f"{text.removeprefix('Error merging override ')}: {reason}"
    if match := re.search(r"Could not override '([\w.@/]+)'", text):
        return _no_key(match[1], config())
    if match := re.search(r"'hydra/(?:launcher|sweeper)/(submitit|joblib|ray|optuna)(?:_local|_slurm|_aws)?'", text):
        package, extra = match[1], "slurm" if match[1] == "submitit" else match[1]
        return f"Hydra's {package} plugin is not installed: pip install -e '.[{extra}]' (or coca_lit[{extra}])"
    if match := re.search(r"Could not (?:find|load) '([\w./]+)'", text):
        group, _, wanted = match[1].rpartition("/")
        known = options(group)
        return f"'{group}' has no option '{wanted}'{suggest(wanted, known)} The options: {', '.join(known)}"
    if match := re.match(r"In '(.+)': \w+ raised while composing config:\n(.+)\n\s+full_key: (\S+)", text):
        file, reason, key = match.groups()
        return f"in '{file}': {_no_key(key, config()) if reason.startswith('Key ') else f'{key}: {reason}'}"
    return text


def _no_key(key: str, config: DictConfig) -> str:
    return f"there is no key '{key}'{suggest(key, _keys(OmegaConf.to_container(config, resolve=False)))}"


def _keys(node: Any, prefix: str = "") -> Iterable[str]:
    if isinstance(node, dict):
        for key, child in node.items():
            yield f"{prefix}{key}"
            yield from _keys(child, f"{prefix}{key}.")
