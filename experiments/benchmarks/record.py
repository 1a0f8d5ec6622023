"""Records a benchmark: rows are printed and appended to a CSV, with the facts that their numbers depend on.

record(Path(__file__).with_suffix(".csv"), [{"case": "beam", "seconds": 1.2}])
"""

import csv
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from coca_lit.runs.run_folder import environment

PACKAGES = (  # those that are installed
    *("torch", "open_clip_torch", "clip_benchmark", "pycocoevalcap", "transformers"),
    *("pillow", "simplejpeg", "webdataset"),
)


def record(csv_path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the rows, each {column: value}, and appends them to the CSV with date, command, commit, machine, versions.

    A new column is empty in older rows.
    """
    path, about = Path(csv_path), provenance()
    for row in rows:
        print(" · ".join(f"{column} {_text(value)}" for column, value in row.items()), flush=True)
    old = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    new = [{column: _text(value) for column, value in row.items()} | about for row in rows]
    columns = dict.fromkeys(column for row in (*old, *new) for column in row if column not in about)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *about], restval="")
        writer.writeheader()
        writer.writerows([*old, *new])


def provenance() -> dict[str, str]:
    """Date (UTC), command, commit, machine, threads and versions of the running script."""
    found = _at_start()
    releases = {"python": found["python"]} | {name: _release(name) for name in PACKAGES}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "command": " ".join(["python", *map(_without_folder, sys.argv)]),
        "commit": found["commit"],
        "machine": found["machine"],
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", ""),
        "versions": " ".join(f"{name}={release}" for name, release in releases.items() if release),
    }


@functools.cache
def _at_start() -> dict[str, Any]:
    """Once, and whatever rows and tables were written already, which would make the commit of the next rows dirty."""
    found = environment()
    others = ["git", "diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)experiments/*.csv"]
    others.append(":(top,exclude)experiments/benchmarks/README.md")  # whose tables are made of the rows
    if shutil.which("git") and not subprocess.run(others, cwd=Path(__file__).parent, check=False).returncode:
        found["commit"] = found["commit"].removesuffix("-dirty")
    return found


def _release(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _without_folder(argument: str) -> str:
    """Paths from the root of the project; of others the name alone, as folders differ between machines."""
    key, equals, value = argument.rpartition("=")
    path, root = Path(value), Path(__file__).resolve().parents[2]
    if not path.is_absolute() and not path.exists():
        return argument
    path = path.resolve()
    return f"{key}{equals}{path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name}"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
