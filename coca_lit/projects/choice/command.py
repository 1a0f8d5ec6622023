"""`coca-score … --synonyms FILE --instances FILES`: CHAIR beside the other scores of captions."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coca_lit.tools.score.command import score_files

if TYPE_CHECKING:
    from coca_lit.projects.choice.chair import Chair


def score_with_chair(words: Sequence[str]) -> None:
    """Answers the words of `coca-score`, of which `--synonyms` or `--instances` is one."""
    parser = argparse.ArgumentParser("coca-score", add_help=False)
    parser.add_argument("--synonyms", type=Path)
    parser.add_argument("--instances", type=Path, nargs="+", action="extend")
    options, others = parser.parse_known_args(words)
    if options.synonyms is None or options.instances is None:
        parser.error("CHAIR needs both --synonyms and --instances")

    def read_chair() -> "Chair":
        from coca_lit.projects.choice.chair import Chair

        return Chair(options.synonyms, options.instances)

    score_files(others, read_chair)
