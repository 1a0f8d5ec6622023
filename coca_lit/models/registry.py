"""Image encoders, poolers and text towers by name: the package's own, imported on demand, and registered ones from
outside.

A checkpoint stores the name of a registered part together with the module that registered it ("module:name"), as data:
reading a checkpoint never imports that module. Import it first, or pass `imports=["module"]` to what reads or builds
the model.
"""

import difflib
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from coca_lit import extensions
from coca_lit.errors import suggest

Factory = Callable[..., nn.Module]
Part = TypeVar("Part", bound=nn.Module)
# Beginnings of arguments of timm's constructors that say where weights are read from.
READS_WEIGHTS = (
    *("pretrained", "checkpoint", "cache_dir", "url", "file", "hf_hub", "state_dict", "source", "custom_load"),
)
NORMALISATION = "pretrained_cfg_overlay"  # timm's name of what replaces mean and deviation of the pixels


class Registry:
    """Factories by name.

    Args:
        kind: what the factories make, for messages.
        own: where CoCa's own factories are, "module:class", by name. Checkpoints store their names alone.
        table: the table of `project.toml` in which projects declare others, see `coca_lit.extensions`.
    """

    def __init__(self, kind: str, own: Mapping[str, str], table: str) -> None:
        self.kind = kind
        self.table = table
        self._own = own
        self._factories: dict[str, Factory] = {}
        self._registrars: dict[str, str] = {}  # the modules that registered them

    def register(self, name: str) -> Callable[[Factory], Factory]:
        """A decorator that registers a factory, a function or a class.

        Raises:
            ValueError: the name is taken by another factory, or contains a colon.
        """
        if ":" in name:
            raise ValueError(f"the name of a {self.kind} must not contain a colon, got '{name}'")
        registrar = sys._getframe(1).f_globals.get("__name__", "__main__")

        def decorate(factory: Factory) -> Factory:
            known = self.get(name)
            if known is not None and _origin(known) != _origin(factory):
                known_by = self._registrar(name, known)
                raise ValueError(f"the {self.kind} '{name}' is already registered by the module '{known_by}'")
            self._factories[name], self._registrars[name] = factory, registrar
            return factory

        return decorate

    def get(self, spec: str) -> Factory | None:
        """The factory called "name" or "module:name"; None if there is none. The module may have moved in its package,
        or out of a notebook.
        """
        module, _, name = spec.rpartition(":")
        if name not in self._factories:
            place = self._own.get(name) or extensions.declared(self.table).get(name)
            if place is not None:
                self._factories[name] = pkgutil.resolve_name(place)
        factory = self._factories.get(name)
        if factory is not None and module not in ("", "__main__"):
            places = {_package(factory.__module__), _package(self._registrar(name, factory))}
            return factory if _package(module) in places else None
        return factory

    def name_of(self, factory: Factory) -> str | None:
        """The name under which a factory is registered; None if it is not."""
        for name, known in self._factories.items():
            if known is factory:
                return name
        place = ":".join(_origin(factory))
        places = {**self._own, **extensions.declared(self.table)}
        return next((name for name, known in places.items() if known == place), None)

    def _registrar(self, name: str, factory: Factory) -> str:
        """The module that registered it; a part of this package has its own."""
        return self._registrars.get(name, factory.__module__)

    def is_guest(self, spec: str) -> bool:
        """Whether it is registered from outside this package."""
        factory = self.get(spec)
        if factory is None:
            return False
        return _package(self._registrar(spec.rpartition(":")[2], factory)) != _package(__name__)

    def __contains__(self, spec: str) -> bool:
        return self.get(spec) is not None

    def spec(self, spec: str) -> str:
        """A registered name in the form that checkpoints store, "module:name"; other names unchanged."""
        factory = self.get(spec)
        name = spec.rpartition(":")[2]
        if factory is None or name in self._own:
            return spec
        return f"{self._registrar(name, factory)}:{name}"

    def build(
        self, spec: str, ours: Mapping[str, Any], given: Mapping[str, Any], known: Iterable[str] = ()
    ) -> nn.Module:
        """What the factory called `spec` ("name" or "module:name") makes of its arguments.

        Args:
            ours: the arguments that every factory gets.
            given: those that the user chose.
            known: further names to suggest.

        Raises:
            ValueError: there is no such factory; the message says which module registered it, or suggests a name. Or
                it does not take a given argument, or needs another one, see `build_from`.
        """
        factory = self.get(spec)
        if factory is not None:
            return build_from(factory, f"{self.kind.replace(' ', '_')}_args", ours, given)
        module, _, name = spec.rpartition(":")
        missing = extensions.where_to_get(spec) if module else ""
        if missing:
            raise ValueError(f"there is no {self.kind} '{name}'{missing}")
        if module:
            raise ValueError(f"the {self.kind} '{name}' is registered by '{module}': pass imports=['{module}']")
        names = list(dict.fromkeys([*self._own, *extensions.declared(self.table), *self._factories, *known]))
        close = difflib.get_close_matches(name, names, n=5) or names[:5]
        raise ValueError(f"there is no {self.kind} '{name}'; similar names: {', '.join(close)}")


def build_from(factory: Callable[..., Part], key: str, ours: Mapping[str, Any], given: Mapping[str, Any]) -> Part:
    """What a class or function makes of its arguments.

    Args:
        key: what the user calls the given arguments, such as "decoder_args".
        ours: the arguments that every factory of its kind gets.
        given: those that the user chose.

    Raises:
        ValueError: it does not take a given argument, and the message suggests one; or it needs one that is not given.
    """
    parameters = inspect.signature(factory).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in ours]
    try:
        return factory(**ours, **given)
    except TypeError as error:  # its own, or a base class's to which it hands on what it does not know
        refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if refused is not None and refused[1] in given:
            names = [parameter.name for parameter in named]
            known = f"{key} may hold {', '.join(names) or 'nothing'}"
            raise ValueError(f"there is no '{key}.{refused[1]}'{suggest(refused[1], names)} {known}") from error
        missing = [p.name for p in named if p.default is p.empty and p.name not in given]
        if missing:
            raise ValueError(f"{key}.{missing[0]} is missing, without which it cannot be built") from error
        raise


def _origin(factory: Factory) -> tuple[str, str]:
    """Where it is defined; of a `functools.partial`, what it calls."""
    factory = getattr(factory, "func", factory)
    return factory.__module__, factory.__qualname__


def _package(module: str) -> str:
    return module.partition(".")[0]


def import_modules(modules: Iterable[str]) -> None:
    """Imports modules that register parts of models.

    Raises:
        ValueError: a module cannot be found.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or f"{module}.".startswith(f"{error.name}."):
                raise ValueError(f"imports: there is no module '{module}'; is its package installed?") from error
            raise ValueError(
                f"imports: {module} imports '{error.name}', which is not installed; if it lies in the current folder, "
                f"name it as well: imports=[{error.name},{module}]"
            ) from error


IMAGE_ENCODERS = Registry("image encoder", {}, "image_encoders")
POOLERS = Registry(
    "pooler",
    {
        "single": "coca_lit.models.poolers:SinglePooling",
        "parallel": "coca_lit.models.poolers:ParallelPooling",
        "cascade": "coca_lit.models.poolers:CascadePooling",
        "openclip_parallel": "coca_lit.models.poolers:OpenClipParallelPooling",
        "openclip_cascade": "coca_lit.models.poolers:OpenClipCascadePooling",
    },
    "poolers",
)
TEXT_TOWERS = Registry("text tower", {}, "text_towers")
OBJECTIVES = Registry("objective", {}, "objectives")  # those that are kept with the model
register_image_encoder = IMAGE_ENCODERS.register
register_objective = OBJECTIVES.register
register_pooler = POOLERS.register
register_text_tower = TEXT_TOWERS.register


def check_architecture(arguments: Mapping[str, Any]) -> None:
    """Raises `ValueError` for an argument of an image encoder that names a file or an address of weights: checkpoints
    hold the arguments, and may be a stranger's.
    """
    for key, value in arguments.items():
        overlay = key == NORMALISATION and isinstance(value, Mapping) and value.keys() <= {"mean", "std"}
        if key.startswith(READS_WEIGHTS) and not overlay:
            raise ValueError(
                f"image_encoder_args.{key} is no part of an architecture; for weights of an image encoder see"
                " init_parts.image_encoder"
            )


def has_guests(arguments: Mapping[str, Any]) -> bool:
    """Whether a model with these arguments has parts from outside."""
    registries = {"image_encoder": IMAGE_ENCODERS, "pooler": POOLERS, "text_tower": TEXT_TOWERS}
    return any(registry.is_guest(arguments.get(part) or "") for part, registry in registries.items())
