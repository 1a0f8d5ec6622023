"""What a config may say: the constructors are the schema, and `conf/` for what no constructor takes."""

import functools
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, Unpack, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf

from coca_lit.errors import NO_SUGGESTION, ConfigError, suggest
from coca_lit.extensions import DeclaredArguments, declared, schedule_keys

BUILD_KEYS = ("_target_", "_args_", "_partial_")  # of a node, which are no arguments
NUMBERS = (int, float, bool)
BATCH_SCHEDULE = "batch_schedule"  # the argument to which keys of projects belong
AUTO = "auto"  # a recipe chooses the value, see `coca_lit.training.recipe`
ELSEWHERE = {  # keys that a run sets from others
    "trainer.callbacks": "set callbacks.NAME instead",
    "trainer.logger": "set logger.NAME instead",
    "trainer.enable_checkpointing": "set callbacks.checkpoint, or callbacks.checkpoint=null for none",
    "trainer.plugins": "choose trainer.precision and trainer.strategy",
    "trainer.overfit_batches": "set data.train_count, or another small training set, and as many trainer.max_epochs",
    "model.micro_batch_size": "set trainer.micro_batch_size instead",
    "model.batch_schedule": "set data.batch_schedule instead",
}


class Argument(NamedTuple):
    """An argument of a constructor: its annotation, and its default (`...` for none, or for one that is no plain
    value).
    """

    annotation: Any = Any
    default: Any = ...


class Signature(NamedTuple):
    """The arguments of a class or function, and whether it takes any others, too."""

    arguments: dict[str, Argument]
    takes_any: bool


UNKNOWN = Signature({}, True)


def argument_defaults(node: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The defaults of all constructors in a part of a config, by key, as plain values.

    Args:
        path: key of the part, with a full stop at its end; empty for the whole config.
    """
    signature = signature_at(node, path)
    defaults = {name: a.default for name, a in signature.arguments.items() if a.default is not ...}
    for key, child in node.items():
        if isinstance(child, dict):
            defaults[key] = argument_defaults(child, f"{path}{key}.")
    return defaults


def signature_at(node: Mapping[str, Any], path: str) -> Signature:
    """The signature of the target of a node, with the keys that projects declare for a batch schedule if it takes one.

    Args:
        path: key of the node, with a full stop at its end.
    """
    signature = read_signature(node.get("_target_"))
    if BATCH_SCHEDULE not in signature.arguments:
        return signature
    of_schedule: dict[str, Argument] = {}
    for name, schedule in schedule_keys(path.removesuffix(".")).items():
        of_schedule[name] = Argument()
        if name in node:  # only then the project is imported
            of_schedule[name] = read_signature(schedule).arguments.get(name, Argument())
    return Signature(of_schedule | signature.arguments, signature.takes_any)


@functools.cache
def read_signature(target: Any) -> Signature:
    """The signature of the class or function with this full name, whose module is imported. Where there is none, as of
    a package that is not installed, anything counts as an argument.
    """
    try:
        found = pkgutil.resolve_name(str(target))
    except (ImportError, AttributeError, ValueError, SyntaxError):
        return UNKNOWN
    return _signature(found)


def _signature(target: Callable[..., Any]) -> Signature:
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # of something else, or of what is written in C
        return UNKNOWN
    annotations = _annotations(target)
    arguments: dict[str, Argument] = {}
    others = None  # the annotation of **others
    for parameter in parameters:
        annotation = annotations.get(parameter.name, parameter.annotation)
        if parameter.kind is parameter.VAR_KEYWORD:
            others = annotation
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            arguments[parameter.name] = Argument(annotation, _plain(parameter.default))
    if others is None:
        return Signature(arguments, False)
    inherited = _inherited(target)
    if get_origin(others) is Annotated:
        shared: dict[str, Argument] = {}
        takes_any = False
        for source in others.__metadata__:
            if isinstance(source, DeclaredArguments):
                shared |= {name: Argument(source) for name in declared(source.kind)}  # of modules not imported yet
            elif isinstance(source, str):  # the arguments of a class, which gets other defaults
                of_class = read_signature(source)
                shared |= {name: Argument(argument.annotation) for name, argument in of_class.arguments.items()}
                takes_any = of_class.takes_any
            else:
                shared |= _fields(source, inherited)
        return Signature(arguments | shared | arguments, takes_any)  # its own first
    if get_origin(others) is Unpack:
        of_projects = {name: a for name, a in inherited.items() if isinstance(a.annotation, DeclaredArguments)}
        return Signature(arguments | _fields(get_args(others)[0], inherited) | of_projects | arguments, False)
    return Signature(arguments | inherited | arguments, True)


def _fields(keys: type, inherited: Mapping[str, Argument]) -> dict[str, Argument]:
    """The keys of a TypedDict, with the defaults of the base class."""
    return {name: inherited.get(name, Argument(annotation)) for name, annotation in get_type_hints(keys).items()}


def _annotations(target: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a constructor or function; none where one names what only type checkers import."""
    function = vars(_owner(target))["__init__"] if isinstance(target, type) else target
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, AttributeError, TypeError):
        return {}


def _inherited(target: Callable[..., Any]) -> dict[str, Argument]:
    """The arguments of the class to whose constructor the constructor of a class may hand others on."""
    if not isinstance(target, type):
        return {}
    following = target.__mro__[target.__mro__.index(_owner(target)) + 1 :]
    return _signature(following[0]).arguments if following else {}


def _owner(target: type) -> type:
    """The class, of a class and its bases, that defines the constructor."""
    return next(parent for parent in target.__mro__ if "__init__" in vars(parent))


def _plain(default: Any) -> Any:
    """A default as a config would hold it; `...` for none, or for another object."""
    if isinstance(default, tuple | list):
        values = [_plain(value) for value in default]
        return ... if ... in values else values
    return default if type(default) in (NoneType, bool, int, float, str) else ...


# Checks


class MissingValueError(ConfigError):
    """A key without a default that nobody set."""


class Place(NamedTuple):
    """A dictionary in a config, and what is shipped there: nothing inside of an argument, where any key is free."""

    path: str  # of the dictionary, with a full stop at its end; empty for the whole config
    node: Mapping[str, Any]
    shipped: Mapping[str, Any]


def check(
    node: Mapping[str, Any], shipped: Mapping[str, Any], groups: Iterable[str] = (), constructors: bool = True
) -> None:
    """Compares a config with the signatures of all its targets, and the rest of it with the config as shipped.

    Args:
        node, shipped: plain values, with interpolations as they stand.
        groups: names of config groups, to suggest.
        constructors: import them, which takes seconds; without them, what has a target is let through, and so is an
            unknown key that resembles none of the config's.

    Raises:
        ConfigError: a key that nobody takes, or a value of another type than is expected.
    """
    for place in sorted(_places("", node, shipped), key=_turn):
        known, takes_any = _known(place, constructors)
        for name, value in place.node.items():
            key = f"{place.path}{name}"
            if key in ELSEWHERE:
                raise ConfigError(f"{key} cannot be set: {ELSEWHERE[key]}")
            if name in known:
                wrong = _mistake(value, known[name].annotation)
                if wrong:
                    raise ConfigError(f"{key} must be {wrong}, got {written(value)}")
            elif not takes_any and not (_has_parts(place) and _is_part(value)):
                beside = [] if isinstance(value, dict) else get_close_matches(str(name), known, n=1, cutoff=0.7)
                suggestion = _suggest_key(key, [f"{place.path}{argument}" for argument in beside])
                key = _innermost(key, value)
                if not beside:  # a key elsewhere may be meant
                    names = [*_names(shipped, constructors), *_names(node, constructors), *groups]
                    suggestion = _suggest_key(key, names)
                if constructors or suggestion != NO_SUGGESTION:
                    raise ConfigError(f"there is no key '{key}'{suggestion}")


def _turn(place: Place) -> int:
    """When a place is checked. First those with a key that no file lists beside others, as a misspelt one: the others
    need not be imported then.
    """
    if place.node.keys() <= place.shipped.keys():
        return 2
    return 0 if place.shipped else 1


def _innermost(key: str, value: Any) -> str:
    """The whole name of a key that was given, by the first part of it and the value there."""
    while isinstance(value, dict) and len(value) == 1:
        ((name, value),) = value.items()
        key = f"{key}.{name}"
    return key


def _suggest_key(key: str, names: Iterable[str]) -> str:
    """The end of a sentence about an unknown key: `suggest` with keys that are neither above nor below it."""
    known = []
    for name in dict.fromkeys(names):
        if not f"{name}.".startswith(f"{key}.") and not key.startswith(f"{name}."):
            known.append(name)
    last_parts = {name.rpartition(".")[2]: name for name in sorted(known, key=lambda name: -name.count("."))}
    return suggest(key, known, last_parts)


def _places(path: str, node: Mapping[str, Any], shipped: Mapping[str, Any]) -> Iterator[Place]:
    """All dictionaries in a config, the outer ones first."""
    yield Place(path, node, shipped)
    for key, value in node.items():
        before = shipped.get(key)
        if not isinstance(before, dict) or ("_target_" in node and "_target_" not in before):
            before = {}
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, dict):
                yield from _places(f"{path}{key}.", child, before)


def _has_parts(place: Place) -> bool:
    """Whether it holds parts such as callbacks: any name, for something to build."""
    kinds = {type(value) for value in place.shipped.values()}
    return kinds in ({dict}, {dict, NoneType}) and "_target_" not in place.node


def _is_part(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and "_target_" in value)


def _known(place: Place, constructors: bool) -> tuple[dict[str, Argument], bool]:
    """What may stand in a place: the arguments of its target, and what is shipped beside them for somebody else, as
    `trainer.micro_batch_size` is; and whether anything else may, too.
    """
    listed = {key: Argument(type(value), value) for key, value in place.shipped.items()}
    if _has_parts(place):
        return {}, False
    if "_target_" not in place.node:
        return listed, not place.shipped
    if not constructors:
        return {}, True
    signature = signature_at(place.node, place.path)
    before = read_signature(place.shipped.get("_target_"))
    beside = {key: listed[key] for key in listed.keys() - before.arguments.keys()} if before.arguments else {}
    if {"records", "settings"} <= signature.arguments.keys():  # a function as evaluation
        beside["every"] = Argument(int)
    return dict.fromkeys(BUILD_KEYS, Argument()) | signature.arguments | beside, signature.takes_any


def _names(node: Any, constructors: bool, path: str = "") -> list[str]:
    """All keys of a config, and those that its constructors take."""
    if not isinstance(node, dict):
        return []
    keys = dict.fromkeys(node)
    if constructors:
        keys |= dict.fromkeys(signature_at(node, path).arguments)
    return [name for key in keys for name in (f"{path}{key}", *_names(node.get(key), constructors, f"{path}{key}."))]


def _mistake(value: Any, annotation: Any) -> str | None:
    """What is expected in place of a value, in words; None if it may stand there, or if that is hard to say."""
    if value in (None, "???", AUTO) or (isinstance(value, str) and "${" in value):
        return None
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = [kind for kind in alternatives if kind is not NoneType]
    if len(kinds) == 1 and get_origin(kinds[0]) is Literal:
        choices = get_args(kinds[0])
        *others, last = map(str, choices)
        return None if value in choices else " or ".join(filter(None, (", ".join(others), last)))
    if kinds == [list]:
        return "a list" if not isinstance(value, list) else None
    if not kinds or not all(kind in NUMBERS for kind in kinds) or (isinstance(value, bool) and bool in kinds):
        return None
    if kinds == [bool]:
        return "true or false"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or (float not in kinds and value % 1):
        return "a number" if float in kinds else "a whole number"
    return None


def check_complete(node: Mapping[str, Any]) -> None:
    """Raises `MissingValueError` for a value that is still to be given."""
    for key, value in leaves(node):
        if value == "???":
            raise MissingValueError(f"{key} is missing: set {key}=VALUE")


def targets(node: Any) -> list[str]:
    """The names of all that a config builds."""
    children = [*node.values()] if isinstance(node, dict) else node if isinstance(node, list) else []
    of_node = [str(node["_target_"])] if isinstance(node, dict) and "_target_" in node else []
    return [*of_node, *(name for child in children for name in targets(child))]


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of all values in nested dictionaries, of which an empty one is a value."""
    if not isinstance(node, dict) or not node:
        yield path, node
        return
    for key, value in node.items():
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def part_of(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A part of a config; empty where a stranger's holds something else."""
    found = config.get(key)
    return found if isinstance(found, dict) else {}


def written(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, float):
        return str(value)  # YAML would write 1.0e-05
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").strip()


def unresolved(cfg: Any) -> Any:
    """A config as plain values, with interpolations as they stand."""
    return OmegaConf.to_container(cfg, resolve=False)
