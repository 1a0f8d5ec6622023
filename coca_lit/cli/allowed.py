"""What a config may run: the classes and functions that its `_target_`s may name.

These are what `PACKAGES` lists, installed projects, the user's own modules, and modules that the user names in
`imports`. A module is the user's own if it is not installed: it lies beside the configs or on `PYTHONPATH`.
`coca_lit.cli.assembly` builds no others; Hydra builds only what is its own, ours or a project's.
"""

import pkgutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from coca_lit import extensions
from coca_lit.errors import ConfigError

# Of PyTorch, Lightning and timm only what reads no files and starts no programs.
PACKAGES = (
    "coca_lit",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.core",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.pytorch.trainer",
    "timm.layers",
    "timm.loss",
    "timm.optim",
    "timm.scheduler",
    "torch._C._nn",  # where functions of torch.nn are defined
    "torch.nn",
    "torch.optim",
    "torchmetrics",
)
OF_HYDRA = ("hydra", "hydra_plugins", "coca_lit")  # of which it builds its own part of a config
NAMING = ("_target_", "report", "()", "class")  # keys there that name code; the last two of Python's logging
INSTALLED = ("site-packages", "dist-packages")  # folders of installed packages

_named: set[str] = set()  # modules in `imports` of the newest config


def trust_modules(modules: Iterable[str]) -> None:
    """Allows what is in these modules, and in no others that an earlier config named."""
    _named.clear()
    _named.update(map(str, modules))


def check_packages(targets: Iterable[str]) -> None:
    """Checks names of classes and functions before their modules are imported.

    Raises:
        ConfigError: a target of a package of which a config may run nothing.
    """
    for target in targets:
        if target == MISSING:  # the user is still to name it
            continue
        root = target.partition(".")[0]
        if "${" in target:
            raise ConfigError(f"_target_ must be the name of a class or a function, got '{target}'")
        if root not in _roots() and not _is_own(root):
            raise ConfigError(_refusal(target, root))


def check_targets(targets: Sequence[str]) -> None:
    """`check_packages`, and then what the names lead to: an allowed module may have imported `os`. A name that leads to
    nothing passes.

    Raises:
        ConfigError: a target that a config may not run.
    """
    check_packages(targets)
    for target in targets:
        try:
            found: Any = pkgutil.resolve_name(target)
        except (ImportError, AttributeError, ValueError, SyntaxError):
            continue
        if not hasattr(found, "__qualname__"):  # an object of the module
            continue
        module = str(found.__module__)
        own = _is_own(module.partition(".")[0]) or _is_within(module, (*_packages_of_projects(), *_named))
        # A method of a foreign class may do what its constructor does not.
        foreign = _is_within(module, PACKAGES) and ("." not in found.__qualname__ or module.startswith("coca_lit."))
        if not own and not foreign:
            raise ConfigError(_refusal(target, module))


def check_hydra(config: DictConfig) -> None:
    """Checks Hydra's own part of a config before Hydra builds from it: 1.3 refuses less than 1.4 does.

    Raises:
        ConfigError: a callback or a log names what is neither Hydra's, nor Python's `logging`, nor ours or a project's.
    """
    check_names(config.hydra.callbacks, "hydra.callbacks", *OF_HYDRA)
    for key in ("hydra_logging", "job_logging"):
        check_names(OmegaConf.to_container(config.hydra[key]), f"hydra.{key}", *OF_HYDRA)


def check_names(node: Any, path: str, *packages: str) -> None:
    """Checks that all that a config names is in these packages or in projects.

    Args:
        node: with its values, or as plain values with references, which may then stand in file names alone.
        path: its key, for errors.

    Raises:
        ConfigError: it is in another package, or a reference.
    """
    packages = (*packages, *_packages_of_projects())
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    for key, value in _leaves(plain):
        if "${" in value and key != "filename":  # may become what names code
            raise ConfigError(f"{path}: '{key}' must be plain, got '{value}'")
        if key not in NAMING or value.rpartition(".")[0] in ("logging", "logging.handlers"):
            continue
        module = value
        if _is_within(value, packages) and key != "report":  # which a sweep loads at its end, for a second
            with suppress(ImportError, AttributeError, ValueError, SyntaxError):  # a name that leads to nothing
                module = getattr(pkgutil.resolve_name(value), "__module__", value)
        if not _is_within(module, packages):
            raise ConfigError(f"{path} may not run '{value}': it is not in {', '.join(packages[:3])} or a project")


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The texts in nested dictionaries and lists, each with the key nearest to it."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, str(name))
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, key)
    elif isinstance(node, str):
        yield key, node


def hydra_builds(*packages: str) -> AbstractContextManager[Any]:
    """Within it Hydra 1.4, which has a list of its own, builds what is in these packages and in projects."""
    try:
        from hydra.utils import execution_whitelist  # type: ignore[attr-defined, unused-ignore] # since 1.4
    except ImportError:
        return nullcontext()
    names = [*packages, *_packages_of_projects()]
    allowed: AbstractContextManager[Any] = execution_whitelist([*names, *(f"{name}.*" for name in names)])
    return allowed


def _refusal(target: str, module: str) -> str:
    return (
        f"a config may not run '{target}', which belongs to the module '{module}': if you trust that module, add "
        f"imports=[{module}]"
    )


def _roots() -> set[str]:
    return {name.partition(".")[0] for name in (*PACKAGES, *_packages_of_projects(), *_named)}


def _packages_of_projects() -> list[str]:
    return [project.package for project in extensions.projects()]


def _is_within(module: str, packages: Iterable[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def _is_own(root: str) -> bool:
    """Whether the top-level module belongs to the user: it is neither installed nor Python's."""
    if root == "__main__":
        return True
    if root in sys.stdlib_module_names or not root.isidentifier():
        return False
    try:
        spec = find_spec(root)
    except ValueError:
        return False
    if spec is None:  # nothing that could be run
        return True
    places = [Path(place) for place in spec.submodule_search_locations or [spec.origin or ""]]
    standard = Path(sysconfig.get_path("stdlib"))
    return not any(place.is_relative_to(standard) or set(INSTALLED) & set(place.parts) for place in places)
