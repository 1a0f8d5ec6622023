"""What a config may say: the constructors are the schema, and `conf/` for what no constructor takes.

Signatures are read from the source. Importing Lightning or PyTorch for them would let a misspelt key wait for seconds,
and run code before anybody has looked at the config.
"""

import ast
import builtins
import functools
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf

from coca_lit.errors import ConfigError, suggest

HYDRA_KEYS = ("_target_", "_args_", "_partial_", "_convert_", "_recursive_")  # that `instantiate` reads itself
NUMBERS = {"int", "float", "bool"}
AUTO = "auto"  # a recipe chooses the value, see `coca_lit.training.recipe`
ELSEWHERE = {  # keys that a run sets from others
    "trainer.callbacks": "set callbacks.NAME instead",
    "trainer.logger": "set logger.NAME instead",
    "trainer.enable_checkpointing": "set callbacks.checkpoint, or callbacks.checkpoint=null for none",
    "trainer.plugins": "choose trainer.precision and trainer.strategy",
    "trainer.overfit_batches": "set data.train_count, or another small training set, and as many trainer.max_epochs",
    "model.micro_batch_size": "set trainer.micro_batch_size instead",
}


class Argument(NamedTuple):
    """An argument of a constructor: its annotation, and its default (`...` for none, or for one that is no literal)."""

    annotation: str = ""
    default: Any = ...


class Signature(NamedTuple):
    """The arguments of a class or function, and whether it takes any others, too."""

    arguments: dict[str, Argument]
    takes_any: bool


def argument_defaults(node: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of all constructors in a part of a config, by key, as plain values."""
    signature = read_signature(node.get("_target_"))
    defaults = {name: a.default for name, a in signature.arguments.items() if a.default is not ...}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    return plain | {key: argument_defaults(child) for key, child in node.items() if isinstance(child, dict)}


@functools.cache
def read_signature(target: Any) -> Signature:
    """The signature of the class or function with this full name, which takes anything if it cannot be read."""
    found = definition(str(target))
    if found is None:
        return Signature({}, True)
    node, module = found
    parents = node.bases if isinstance(node, ast.ClassDef) else []
    body = node.body if isinstance(node, ast.ClassDef) else [node]
    made = next((f for f in body if isinstance(f, ast.FunctionDef) and f.name in ("__init__", node.name)), None)
    marks = " ".join(map(ast.unparse, [*node.decorator_list, *parents]))
    if made is None and ("dataclass" in marks or "NamedTuple" in marks):
        return Signature(_fields(str(target)), False)
    bases = [read_signature(f"{module}.{ast.unparse(base)}") for base in parents]
    inherited = {name: argument for base in reversed(bases) for name, argument in base.arguments.items()}
    if made is None:
        return Signature(inherited, not bases or any(base.takes_any for base in bases))
    positional = [*made.args.posonlyargs, *made.args.args]
    values = [*[None] * (len(positional) - len(made.args.defaults)), *made.args.defaults, *made.args.kw_defaults]
    arguments = {
        a.arg: Argument(_annotation(a.annotation, module), literal(value, module))
        for a, value in zip([*positional, *made.args.kwonlyargs], values, strict=True)
        if a.arg != "self"
    }
    if made.args.kwarg is None:
        return Signature(arguments, False)
    others = ast.unparse(made.args.kwarg.annotation or ast.Constant(""))
    if not (named := re.fullmatch(r"'?(Unpack\[|Annotated\[Any, )(\w+)\]'?", others)):
        return Signature(arguments | inherited, True)  # perhaps for its base class
    # The keys of a TypedDict, with defaults of the base class; or the arguments of a class, which gets other defaults.
    others = f"{module}.{named[2]}"
    taken = Signature(_fields(others), False) if named[1] == "Unpack[" else read_signature(others)
    known = inherited if named[1] == "Unpack[" else {}
    further = {name: known.get(name, Argument(other.annotation)) for name, other in taken.arguments.items()}
    return Signature(arguments | further | arguments, taken.takes_any)  # its own first


def _fields(name: str) -> dict[str, Argument]:
    """The fields of a dataclass, NamedTuple or TypedDict, inherited ones first."""
    node, module = definition(name) or (None, "")
    if not isinstance(node, ast.ClassDef):
        return {}
    fields: dict[str, Argument] = {}
    for base in node.bases:
        fields |= _fields(f"{module}.{ast.unparse(base)}")
    lines = [line for line in node.body if isinstance(line, ast.AnnAssign)]
    return fields | {
        ast.unparse(f.target): Argument(_annotation(f.annotation, module), literal(f.value, module)) for f in lines
    }


@functools.cache
def definition(name: str) -> tuple[ast.ClassDef | ast.FunctionDef, str] | None:
    """A class or function by its full name, and the module in which it is; None if there is no source of it."""
    module, _, leaf = name.rpartition(".")
    for node in ast.walk(_source(module)):  # outermost first
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == leaf:
            return node, module
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if leaf == (alias.asname or alias.name):
                    package = module if _source(f"{module}.__init__").body else module.rpartition(".")[0]
                    parents = package.split(".")
                    near = parents[: len(parents) - node.level + 1] if node.level else []
                    source = ".".join(filter(None, (*near, node.module, alias.name)))
                    return definition(source) if source != name else None
    return None


def literal(node: ast.expr | None, module: str) -> Any:
    """A default as a plain value, also that of a constant of the module or of one that it imports from; `...` for none,
    or one that is more than a literal.
    """
    if isinstance(node, ast.Name) and (found := _constant(node.id, module)):
        return literal(*found)
    try:
        return ast.literal_eval(node) if node is not None else ...
    except ValueError:
        return ...


def _annotation(node: ast.expr | None, module: str) -> str:
    """An annotation as it is written, with the choices in place of the name of a `Literal`."""
    if node is None:
        return ""
    text = ast.unparse(node)
    for name in [part.id for part in ast.walk(node) if isinstance(part, ast.Name) and part.id not in vars(builtins)]:
        if (found := _constant(name, module)) and (choices := ast.unparse(found[0])).startswith("Literal["):
            text = re.sub(rf"\b{name}\b", choices, text)
    return text


def _constant(name: str, module: str) -> tuple[ast.expr, str] | None:
    """What a top-level name stands for, and the module that assigns it, followed through imports within its package or
    coca_lit; None if nothing is found.
    """
    for line in _source(module).body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == name:
            return line.value, module
        if isinstance(line, ast.ImportFrom) and line.module and name in [alias.name for alias in line.names]:
            near = line.module.split(".")[0] in (module.split(".")[0], __name__.split(".")[0])
            return _constant(name, line.module) if near else None
    return None


@functools.cache
def _source(module: str) -> ast.Module:
    """The source of a module, found without importing its packages; empty if there is none. Raises `ConfigError` if it
    is no Python.
    """
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top) if top else None
    except (ValueError, ImportError):
        spec = None
    files = [Path(spec.origin)] if spec and spec.origin and not inner else []
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        place = Path(folder, *inner)
        files.append(place / "__init__.py" if place.is_dir() else place.with_suffix(".py"))
    found = next((file for file in files if file.suffix == ".py" and file.is_file()), None)
    try:
        return ast.parse(found.read_bytes() if found else b"", str(found))  # bytes: the file says how it is encoded
    except SyntaxError as error:
        raise ConfigError(f"{found}, line {error.lineno}: {error.msg}") from error


# Checks


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
        if key in ELSEWHERE:
            raise ConfigError(f"{key} cannot be set: {ELSEWHERE[key]}")
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
    beside = {key: listed[key] for key in listed.keys() - before.arguments.keys()} if before.arguments else {}
    if {"records", "settings"} <= signature.arguments.keys():  # a function as evaluation
        beside["every"] = Argument("int")
    return dict.fromkeys(HYDRA_KEYS, Argument()) | signature.arguments | beside, signature.takes_any


def _names(node: Any, path: str = "") -> list[str]:
    """All keys of a config, and those that its constructors take."""
    if not isinstance(node, dict):
        return []
    own = dict.fromkeys([*node, *read_signature(node.get("_target_")).arguments])
    return [name for key in own for name in (f"{path}{key}", *_names(node.get(key), f"{path}{key}."))]


def _mistake(value: Any, argument: Argument) -> str | None:
    """What is expected in place of a value, in words; None if it may stand there, or if that is hard to say."""
    kinds = {*re.findall(r"[\w.]+", argument.annotation)} - {"Optional", "Union", "None", "NoneType"}
    if value in (None, "???", AUTO) or (isinstance(value, str) and "${" in value) or not kinds:
        return None
    if choices := re.fullmatch(r"Literal\[((?:'\w+'(?:, )?)+)\](?: \| None)?", argument.annotation):
        *others, last = re.findall(r"\w+", choices[1])
        return None if value in (*others, last) else " or ".join(filter(None, (", ".join(others), last)))
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


def check_complete(node: Mapping[str, Any]) -> None:
    """Raises `MissingValueError` for a value that is still to be given."""
    for key, value in leaves(node):
        if value == "???":
            raise MissingValueError(f"{key} is missing: set {key}=VALUE")


def targets(node: Any) -> list[str]:
    """The names of all that a config builds."""
    children = [*node.values()] if isinstance(node, dict) else node if isinstance(node, list) else []
    own = [str(node["_target_"])] if isinstance(node, dict) and "_target_" in node else []
    return [*own, *(name for child in children for name in targets(child))]


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
