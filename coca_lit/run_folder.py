"""What a run leaves behind besides checkpoints: its config, where it ran, its results and its report."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from coca_lit.launch import is_first_process
from coca_lit.redaction import redact


def start_run_folder(cfg: DictConfig) -> None:
    """Writes `config.yaml` and `environment.json`. Values that come from environment variables stay references: no
    secret lands in a file.
    """
    if is_first_process():
        folder = Path(cfg.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=False))
        (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")


def write_results(folder: Path, results: dict[str, float], not_run: dict[str, str]) -> None:
    """Writes `results.json`, `not_run.json` (why a score is missing) and the report, and prints the scores."""
    from coca_lit.report import write_report

    environment = json.loads((folder / "environment.json").read_text())
    environment["seconds"] = round(time.time() - environment["started"])
    (folder / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "not_run.json").write_text(json.dumps(not_run, indent=2) + "\n")
    print_results(results)
    write_report(folder)
    print(f"{environment['seconds']} seconds; everything is in {folder}, to be seen in report.html")


def environment() -> dict[str, Any]:
    """What one has to know to believe a number: command, commit, machine, versions."""
    packages = ("torch", "lightning", "timm", "hydra-core")
    return {
        "command": redact(" ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])),
        "commit": commit(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "started": time.time(),
    }


def commit() -> str:
    """Commit of the checkout, marked if files differ from it; empty outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def print_results(results: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    groups = sorted({name.rpartition("/")[0] for name in results})
    table = Table("score", *groups, title="results", title_justify="left")
    for score in dict.fromkeys(name.rpartition("/")[2] for name in results):
        values = (results.get(f"{group}/{score}") for group in groups)
        table.add_row(score, *("" if value is None else f"{value:.4f}" for value in values))
    if results:
        Console().print(table)
