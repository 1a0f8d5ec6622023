"""The arguments of classes and functions, read from their source.

Importing Lightning or PyTorch for them would let a misspelt key wait for seconds, and run code before anybody has
looked at the config.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


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
    defaults = {name: a.default for name, a in signature.arguments.items() if a.default is not ...} if signature else {}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    return plain | {key: argument_defaults(child) for key, child in node.items() if isinstance(child, dict)}


@functools.cache
def read_signature(target: Any) -> Signature | None:
    """The signature of the class or function with this full name; None if it cannot be read: then it takes what it
    takes.
    """
    found = definition(str(target))
    if found is None:
        return None
    node, module = found
    parents = node.bases if isinstance(node, ast.ClassDef) else []
    body = node.body if isinstance(node, ast.ClassDef) else [node]
    made = next((f for f in body if isinstance(f, ast.FunctionDef) and f.name in ("__init__", node.name)), None)
    marks = " ".join(map(ast.unparse, [*node.decorator_list, *parents]))
    if made is None and ("dataclass" in marks or "NamedTuple" in marks):
        return Signature(_fields(str(target)), False)
    bases = [read_signature(f"{module}.{ast.unparse(base)}") for base in parents]
    inherited = {name: argument for base in reversed(bases) if base for name, argument in base.arguments.items()}
    if made is None:
        takes_any = any(base is None or base.takes_any for base in bases)
        return Signature(inherited, takes_any) if any(bases) else None
    positional = [*made.args.posonlyargs, *made.args.args]
    values = [*[None] * (len(positional) - len(made.args.defaults)), *made.args.defaults, *made.args.kw_defaults]
    arguments = {
        a.arg: Argument(ast.unparse(a.annotation) if a.annotation else "", literal(value, module))
        for a, value in zip([*positional, *made.args.kwonlyargs], values, strict=True)
        if a.arg != "self"
    }
    if made.args.kwarg is None:
        return Signature(arguments, False)
    others = ast.unparse(made.args.kwarg.annotation or ast.Constant(""))
    if handed := re.fullmatch(r"Annotated\[Any, (\w+)\]", others):  # to this class, where they get other defaults
        further = read_signature(f"{module}.{handed[1]}") or Signature({}, True)
        handed_on = {name: Argument(argument.annotation) for name, argument in further.arguments.items()}
        return Signature(arguments | handed_on | arguments, further.takes_any)  # its own first
    if unpacked := re.fullmatch(r"'?Unpack\[(\w+)\]'?", others):
        # Keys of a TypedDict, whose defaults are those of the constructor that takes them in the end.
        fields = {name: inherited.get(name, field) for name, field in _fields(f"{module}.{unpacked[1]}").items()}
        return Signature(arguments | fields, False)
    return Signature(arguments | inherited, True)  # perhaps for its base class


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
        ast.unparse(f.target): Argument(ast.unparse(f.annotation), literal(f.value, module)) for f in lines
    }


@functools.cache
def definition(name: str) -> tuple[ast.ClassDef | ast.FunctionDef, str] | None:
    """A class or function by its full name, and the module in which it is; None if there is no source of it."""
    module, _, leaf = name.rpartition(".")
    for node in ast.walk(_source(module)):  # outermost first
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == leaf:
            return node, module
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                if leaf == (alias.asname or alias.name):
                    return definition(f"{node.module}.{alias.name}")
    return None


def literal(node: ast.expr | None, module: str) -> Any:
    """A default as a plain value, also that of a constant of the module or of one that it imports from; `...` for none,
    or one that is more than a literal.
    """
    if isinstance(node, ast.Name):
        for line in _source(module).body:
            if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == node.id:
                return literal(line.value, module)
            if isinstance(line, ast.ImportFrom) and line.module and node.id in [alias.name for alias in line.names]:
                return literal(node, line.module)
    try:
        return ast.literal_eval(node) if node is not None else ...
    except ValueError:
        return ...


@functools.cache
def _source(module: str) -> ast.Module:
    """The source of a module, found without importing its packages; empty if there is none."""
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
    return ast.parse(found.read_text() if found else "")
