"""Sweeps in processes of their own, and what they leave behind."""

import csv
import os
import subprocess
from pathlib import Path

from helpers.forking import Program
from helpers.running import ROOT

APP = str(ROOT / "tests" / "helpers" / "sweep_app.py")


def run_in(
    folder: Path, *command: str, ranks: int | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder; a Python file is forked from what is imported already."""
    drop = ("PL_", "COV_", "SLURM_", "TORCHELASTIC_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
    own = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    own |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    env = inherited | own | environment
    if command[0].endswith(".py"):
        return Program(*command, cwd=folder, environment=env, ranks=ranks).wait()
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


def rows_of(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def jobs_of(sweep: Path) -> set[str]:
    return {path.name for path in sweep.iterdir() if path.is_dir() and not path.name.startswith(".")}
