"""The page of the site that lists all keys of a training run, from the comments of `conf/train.yaml` and the docstrings
of the constructors that a run builds.

    python .docs/key_reference.py      prints it
"""

import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from coca_lit import extensions
from coca_lit.cli.command import CONF, compose
from coca_lit.cli.schema import read_signature, written
from coca_lit.models.generation.options import OPTIONS, describe

OBJECTS = {
    *("net", "optimizer", "tokenizer", "micro_batch_size", "batch_schedule", "output_dir", "identity", "classifier"),
    *("kwargs", "imports"),
}
INTRODUCTION = """\
# All keys of a training run

A run without overrides (`experiment=demo`), or with the option in the heading, has these defaults. Below `model.net`
they are the constructor's; the preset that `model.net.name` names has its own. What to set for a task:
[README.md](README.md).
"""


class Row(NamedTuple):
    key: str
    default: Any
    meaning: str


def reference() -> str:
    return "\n".join([INTRODUCTION, *(_section(heading, rows) for heading, rows in _sections())])


def _sections() -> Iterator[tuple[str, list[Row]]]:
    base = _plain()
    run = _commented(CONF / "train.yaml", base)
    yield "The run (`conf/train.yaml`)", [row for row in run if row.key != "lora.rank"]  # a section of its own below
    listed = _commented(CONF / "scoring.yaml", base["scoring"], "scoring.")
    others = [row for row in _rows("scoring", base["scoring"]) if row.key not in [known.key for known in listed]]
    yield "`scoring`", listed + others
    generate = [
        Row(f"scoring.generate.{name}", option.default, describe(name))
        for name, option in OPTIONS.items()
        if option.key
    ]
    yield "`scoring.generate`, also `generate` of `coca-caption`, whose default strategy is beam", generate
    yield "`model`", _rows("model", base["model"])
    yield "`model.net`", _rows("model.net", base["model"]["net"])
    yield "`model.optimizer`", _rows("model.optimizer", base["model"]["optimizer"])
    yield "`lora`", _rows("lora", base["lora"])
    for option, heading in (("scenes", "built-in scenes"), ("mscoco", "MS-COCO"), ("laion", "shards")):
        yield f"`data={option}`: {heading}", _rows("data", _plain(f"data={option}", "evals=[]")["data"])
    yield (
        "`trainer`, with any argument of Lightning's `Trainer`",
        _commented(CONF / "trainer" / "auto.yaml", base["trainer"], "trainer."),
    )
    callbacks = [
        row
        for name, node in base["callbacks"].items()
        if node["_target_"].startswith("coca_lit.")
        for row in _rows(f"callbacks.{name}", node)
    ]
    yield "`callbacks`", callbacks
    yield "`evals.NAME`", _rows("evals.NAME", {"_target_": "coca_lit.evals.captions.CaptionScores"})


def _plain(*overrides: str) -> dict[str, Any]:
    plain = OmegaConf.to_container(compose("train", overrides), resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _rows(path: str, node: dict[str, Any]) -> list[Row]:
    """A row for each argument of the constructor that a user sets."""
    defaults, meanings = _constructor(node["_target_"])
    if node["_target_"] == "coca_lit.models.create_model":  # which hands its arguments on
        further, words = _constructor("coca_lit.models.config.CoCaConfig")
        options = extensions.model_options()
        defaults = defaults | further | {option: of.default for option, of in options.items()}
        del defaults["options"]  # which these are
        meanings = words | meanings | {option: of.help for option, of in options.items()}
    if "batch_schedule" in defaults:
        for name, schedule in extensions.schedule_keys(path).items():
            further, words = _constructor(schedule)
            defaults.setdefault(name, None if further[name] is ... else further[name])
            meanings.setdefault(name, words[name])
    names = [name for name in defaults if name not in OBJECTS or (name == "tokenizer" and path == "model.net")]
    return [Row(f"{path}.{name}", node.get(name, defaults[name]), meanings.get(name, "")) for name in names]


def _constructor(name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Arguments of a class or function with their defaults (`...` for none, or one that is no plain value), and what
    the docstrings, of base classes too, say about each.
    """
    declared = extensions.input_options() | extensions.sample_steps() | extensions.batch_sizes()
    meanings = {option: meaning.help for option, meaning in declared.items()} | _said(name)
    return {key: argument.default for key, argument in read_signature(name).arguments.items()}, meanings


def _said(name: str) -> dict[str, str]:
    target = pkgutil.resolve_name(name)
    meanings: dict[str, str] = {}
    for part in reversed(getattr(target, "__mro__", (target,))):
        meanings |= _meanings(inspect.cleandoc(part.__doc__ or ""))
    return meanings


def _meanings(docstring: str) -> dict[str, str]:
    arguments = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
    meanings: dict[str, str] = {}
    for names, text in re.findall(
        r"^    (\w[\w, ]*): (.*?)(?=^    \w|\Z)", arguments[1] if arguments else "", re.MULTILINE | re.DOTALL
    ):
        meanings |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return meanings


def _commented(file: Path, node: dict[str, Any], prefix: str = "") -> list[Row]:
    """The keys of a file at its two outermost levels that have a comment."""
    rows, parent, values = [], "", node
    for indent, key, comment in re.findall(r"^(  )?(\w+):.*?(?: # (.*))?$", file.read_text(), re.MULTILINE):
        if not indent:
            parent, values = f"{key}.", node.get(key) if isinstance(node.get(key), dict) else {}
        if comment and not key.startswith("_") and (not indent or values):
            rows.append(Row(f"{prefix}{parent if indent else ''}{key}", (values if indent else node).get(key), comment))
    return rows


def _section(heading: str, rows: list[Row]) -> str:
    lines = [f"## {heading}", "", "| key | default | meaning |", "|---|---|---|"]
    for row in rows:
        shown = ""
        if row.default is None or isinstance(row.default, bool | int | float | str | list):
            shown = f"`{written(row.default)}`" if len(written(row.default)) < 40 else "…"
        meaning = re.sub(r"\bNone\b", "null", row.meaning).replace("|", r"\|")  # as YAML writes it
        lines.append(f"| `{row.key}` | {shown} | {meaning} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(reference(), end="")
