"""Commands of tools: what is around them, and what projects add in `[commands.TOOL]` of `project.toml`."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from coca_lit import extensions
from coca_lit.errors import UserError
from coca_lit.reading import printable
from coca_lit.runs.launch import announce, print_any_text


@contextmanager
def started(command: str, *mistakes: type[Exception], interrupted: str = "interrupted") -> Iterator[None]:
    """Around a command without Hydra, which is announced: a `UserError`, and what else counts as a mistake of the user,
    is one sentence on standard error and exit code 1.
    """
    print_any_text()
    announce(command)
    told: tuple[type[Exception], ...] = (UserError, *mistakes)
    try:
        yield
    except told as error:
        sys.exit(f"error: {printable(str(error))}")
    except KeyboardInterrupt:
        sys.exit(interrupted)


def command_for(tool: str, words: Sequence[str]) -> Callable[[Sequence[str]], None] | None:
    """The function of a project that answers these words of a tool's command: its first word is a subcommand that the
    project declares, or any word is an option that it declares.

    Raises:
        ConfigError: the function is not there.
    """
    commands = extensions.commands(tool)
    for position, word in enumerate(words):
        name = word.partition("=")[0] if word.startswith("--") else word
        if name in commands and (position == 0 or name.startswith("--")):
            run: Callable[[Sequence[str]], None] = extensions.load(commands[name].run)
            return run
    return None


def further_commands(tool: str) -> str:
    """What projects add to the command of a tool, for the end of its help; nothing if they add nothing."""
    lines = [f"  {word:20}{command.help}" for word, command in extensions.commands(tool).items()]
    return "\n".join(["\n\nadded by projects:", *lines]) if lines else ""
