"""What the subcommands of `coca-data` share, ours and those of projects: the words that they take, where shards are
worked on, and how errors and broken samples are told.
"""

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coca_lit.tools.commands import started

if TYPE_CHECKING:
    from coca_lit.tools.prepare.annotate import AnnotatedShard

    Subcommands = argparse._SubParsersAction["SubcommandParser"]

SHARDS = "folders, 'FOLDER/{00000..00099}.tar', 'FOLDER/*.tar'"


class SubcommandParser(argparse.ArgumentParser):
    """Takes KEY=VALUE for --key VALUE, and ~/ in VALUE for the home, as the other commands do."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = []
        for word in args or ():
            key, equals, value = word.partition("=")
            flag = f"--{key.replace('_', '-')}"
            if value.startswith("~/"):
                value = os.path.expanduser(value)
            if equals and flag in self._option_string_actions:
                word = f"{flag}={value}"
            words.append(word)
        return super().parse_known_args(words, namespace)

    def add_engine(self) -> None:
        """Takes engine=NAME and engine.KEY=VALUE, which `run_subcommand` collects in the option `engine`."""
        self.set_defaults(engine=[])

    def format_help(self) -> str:
        if self.get_default("engine") is not None:
            from coca_lit.cli.command import options_of

            names = "|".join(options_of("engine", "engine"))
            where = "where the work is done (default: cores of this machine)"
            self.epilog = f"engine={names} and engine.KEY=VALUE: {where}"
        return super().format_help()


def data_parser(description: str | None = None) -> "tuple[argparse.ArgumentParser, Subcommands]":
    """The parser of `coca-data`, and where its subcommands are added."""
    parser = argparse.ArgumentParser("coca-data", description=description)
    subcommands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND", parser_class=SubcommandParser)
    return parser, subcommands


def run_subcommand(parser: argparse.ArgumentParser, words: Sequence[str], resumes: bool = True) -> None:
    """Calls the option `run` of the words' subcommand with all its options. A `UserError` is one sentence on standard
    error and exit code 1.

    Args:
        resumes: whether the same command goes on where it was interrupted.
    """
    engine = [word for word in words if is_of_engine(word)]
    options = parser.parse_args([word for word in words if word not in engine])
    if engine and "engine" not in options:
        parser.error(f"unrecognized arguments: {' '.join(engine)}")
    options.engine = engine
    goes_on = "resumes from here" if resumes else "begins again"
    interrupted = f"interrupted: the same command {goes_on}"
    with started("coca-data", FileNotFoundError, PermissionError, interrupted=interrupted):
        options.run(options)


def is_of_engine(word: str) -> bool:
    """Whether it is engine=NAME or engine.KEY=VALUE."""
    return re.match(r"engine(\.[\w.]+)?=", word) is not None


def positive(text: str) -> int:
    """A type of arguments: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def print_faults(name: str, bad: Mapping[str, int], examples: Sequence[str]) -> None:
    """A line about the bad samples of a shard, if there are any."""
    from coca_lit.reading import printable

    if bad:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in bad.items())
        print(printable(f"{name}: {reasons} ({'; '.join(examples)})"))


# Files beside shards that say what models think of the samples


def add_computation(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """The options that `computation` reads."""
    parser.add_argument("--batch-size", type=positive, default=batch_size, help="default: %(default)s")
    parser.add_argument(
        "--num-workers", type=int, help="processes that decode images (default: up to 4; none on macOS and Windows)"
    )
    parser.add_argument("--precision", default="auto", help="fp32, bf16, or auto: bf16 where the device computes it")


def computation(options: argparse.Namespace) -> tuple[int, int, bool]:
    """Batch size, processes that decode, and whether models compute in bf16."""
    import torch

    from coca_lit.cli.runtime import chosen_dtype, configure_libraries
    from coca_lit.tools.caption.command import decoders

    configure_libraries(None)
    return options.batch_size, decoders(options.num_workers), chosen_dtype(options.precision) is torch.bfloat16


def annotate(
    options: argparse.Namespace,
    doing: str,
    what: str,
    function: "Callable[[Path, Any], AnnotatedShard]",
    claim_outputs: Callable[[Sequence[Path], Any], None],
    settings: Any,
) -> None:
    """Runs a function of a shard and settings on the chosen engine, and prints what became of the samples.

    Args:
        options: shards, output and engine are read.
        doing: the activity, such as "scoring".
        what: what a sample gets, such as "scores".
        claim_outputs: called before the work with all shards and the settings.
    """
    from coca_lit.data.shards.listing import local_shards
    from coca_lit.files import OLD, remove_leftovers
    from coca_lit.tools.engines import Work, engine_from
    from coca_lit.tools.prepare.annotate import check_shards

    paths = local_shards(options.shards)
    check_shards(paths, options.output)
    engine = engine_from(options.engine)
    claim_outputs(paths, settings)
    folders = {options.output} if options.output else set()
    for folder in sorted(folders.union(path.parent for path in paths)):  # indexes are beside the shards
        remove_leftovers(folder, older=OLD)
    work = Work(engine, doing)
    shards = sorted(work(function, paths, settings))
    for shard in shards:
        print_faults(str(shard.path), shard.bad, shard.examples)
    good = sum(shard.samples for shard in shards)
    bad = sum(sum(shard.bad.values()) for shard in shards)
    print(f"{good:,} samples have {what}, {bad:,} bad ones are left out")
    work.close(len(paths), found=sum(shard.skipped for shard in shards))
