"""Writes a project into a new folder: the files of `template/`, with its name in the place of `my_method`."""

import argparse
import importlib.util
import keyword
import sys
from collections.abc import Sequence
from pathlib import Path

from coca_lit.errors import ConfigError
from coca_lit.extensions import projects
from coca_lit.runs.launch import isolate
from coca_lit.tools.commands import started

TEMPLATE = Path(__file__).with_name("template")
NAME = "my_method"  # in the template, also in names of files and folders
DESCRIPTION = """\
Writes a project of your own into ./NAME: an objective, an evaluation, an experiment, a page
and tests, all of them short and running.
Install it by `pip install -e NAME`; coca-train then knows experiment=scenes_NAME."""


def new_project(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `coca-new`. Mistakes of the user are one sentence on standard error and exit code 1."""
    isolate()
    parser = argparse.ArgumentParser(
        "coca-new", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="of the project and its package, such as my_loss")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    with started("coca-new", OSError):
        write_project(options.name, Path(options.name))
        print(f"wrote {options.name}/; next:")
        for line in (
            f"pip install -e {options.name}",
            f"coca-train experiment=scenes_{options.name}",
            f"python -m pytest {options.name}",
        ):
            print(f"  {line}")


def write_project(name: str, folder: Path) -> None:
    """Writes the files of the template.

    Raises:
        ConfigError: the name cannot be that of a package, or is taken, or the folder exists.
    """
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise ConfigError(f"'{name}' cannot name a package: use lower-case letters, digits and _, such as my_loss")
    if name in [project.name for project in projects()] or importlib.util.find_spec(name) is not None:
        raise ConfigError(f"there is a project or package '{name}' already: choose another name")
    if folder.exists():
        raise ConfigError(f"{folder} exists already: choose another name, or move it away")
    for source in sorted(TEMPLATE.rglob("*")):
        if source.is_dir() or source.suffix == ".pyc":
            continue
        target = folder / str(source.relative_to(TEMPLATE)).replace(NAME, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text().replace(NAME, name))
