"""The configs as shipped and in a user's own folders: their groups, options and help."""

import functools
import itertools
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType

from coca_lit.cli.schema import unresolved

PACKAGE = Path(__file__).resolve().parents[1]
# In a checkout the configs lie beside the package, in a wheel inside it.
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())


@functools.cache
def shipped(config: str) -> dict[str, Any]:
    """`conf/{config}.yaml` as plain values, without overrides."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        plain: dict[str, Any] = unresolved(hydra.compose(config))
    return plain


def options_of(config: str, group: str = "", words: Sequence[str] = ()) -> tuple[str, ...]:
    """The options of a config group, such as the evaluations, or without one the groups; on the user's own search path
    too.
    """
    return _options(config, group, tuple(word for word in words if word.startswith("hydra.searchpath=")))


@functools.cache
def _options(config: str, group: str, search: tuple[str, ...]) -> tuple[str, ...]:
    kind = ObjectType.CONFIG if group else ObjectType.GROUP
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        options = GlobalHydra.instance().config_loader().get_group_options(group, kind, config, list(search))
    return tuple(option for option in options if not option.startswith("_"))  # base files of others


def filled_help(template: str, config: str, words: Sequence[str]) -> str:
    """The template in `conf/hydra/help` with the options of all config groups."""
    groups = {*options_of(config, "", words)} - {"hydra", "experiment"}
    for place, listed in (("$APP_CONFIG_GROUPS", sorted(groups)), ("$EVALUATIONS", ["evals"])):
        lines = [f"{group}: {', '.join(options_of(config, group, words))}" for group in listed]
        filled = [textwrap.fill(line, width=150, subsequent_indent="  ") for line in lines]
        template = template.replace(place, "\n".join(filled))
    return template.replace("$EXPERIMENTS", _experiments(config, words))


def _experiments(config: str, words: Sequence[str]) -> str:
    """All experiments by task, a line each: the task and the first sentence are comments at the top of the file."""
    folders = [CONF, *map(Path, re.findall(r"file://([^\"',\]]+)", " ".join(words)))]
    tasks: dict[str, list[str]] = {}
    for name in options_of(config, "experiment", words):
        found = [file for folder in folders if (file := folder / "experiment" / f"{name}.yaml").is_file()]
        lines = re.findall(r"^#\s?(?!\s*@package)(.*)", found[0].read_text() if found else "", re.M)
        text = " ".join(itertools.takewhile(lambda line: not re.match(r"[A-Z]\w+:\s", line), lines))
        task = next((line.removeprefix("Task:").strip() for line in lines if line.startswith("Task:")), "others")
        tasks.setdefault(task, []).append(f"    {name:26}{re.split(r'[.:;](?: |$)', text, maxsplit=1)[0]}")
    return "\n".join("\n".join([f"  {task}", *experiments]) for task, experiments in tasks.items())


def first_example(template: str, config: str) -> str:
    """The first example of a help template."""
    line = template.partition("Examples\n")[2].splitlines()[0]
    return f"{re.split(r'  +', line.strip())[0]} (more: coca-{config} --help)"
