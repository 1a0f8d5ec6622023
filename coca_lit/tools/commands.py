"""What projects add to the commands of tools, in `[commands.TOOL]` of `project.toml`: subcommands and options."""

from collections.abc import Callable, Sequence

from coca_lit import extensions


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
