"""The file of scores that `--output` names."""

import argparse
import math
import os
from collections.abc import Mapping
from pathlib import Path

from coca_lit.errors import error_context
from coca_lit.files import write_json
from coca_lit.reading import read_json


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--output`."""
    parser.add_argument("--output", type=Path, help="write the scores there, as JSON")


def check_output(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """Says now what would be wrong with the file, as computing the scores can take hours.

    Raises:
        ConfigError: there is a file that holds something else than scores, or its folder cannot be made.
    """
    if path is None:
        return
    if os.path.isdir(path):
        parser.error(f"--output must name a file, but {path} is a folder")
    with error_context("--output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            known = read_json(path, dict)
            if not all(isinstance(value, int | float | None) for value in known.values()):
                raise ValueError(f"{path} holds something else than scores: choose another")


def write_scores(path: Path | None, scores: Mapping[str, float]) -> None:
    """Writes the scores as they are, null for those that are not defined."""
    if path is not None:
        write_json(path, {name: None if math.isnan(score) else score for name, score in scores.items()})
