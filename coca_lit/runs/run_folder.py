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

from coca_lit.runs.launch import is_first_process
from coca_lit.runs.redaction import redact


def start_run_folder(cfg: DictConfig, checkpoint: Path | None = None) -> None:
    """Writes `config.yaml` and `environment.json`. Values that come from environment variables stay references: no
    secret lands in a file. What an earlier run left is wound back to `checkpoint`, or moved aside for a new start.
    """
    if is_first_process():
        from coca_lit.files import atomic_write, remove_leftovers
        from coca_lit.runs.resume import CHECKPOINTS, resume, start_fresh

        folder = Path(cfg.output_dir)
        for place in (folder, folder / CHECKPOINTS):
            remove_leftovers(place)
        if checkpoint is None:
            start_fresh(folder)
        else:
            resume(folder, checkpoint, roll_back=cfg.ckpt_path != "auto")
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=False).encode())
        atomic_write(folder / "environment.json", _json(environment()))


def finished_results(cfg: DictConfig, checkpoint: Path) -> dict[str, float] | None:
    """The scores of a run that is over and was scored as `cfg` asks for; None if there is something left to do.

    A full disk may have cost the last checkpoint, and a kill the report: then there is.
    """
    from coca_lit.runs.checkpoint_io import inspect
    from coca_lit.runs.resume import RUN_KEY

    folder = Path(cfg.output_dir)
    results, config = folder / "results.json", folder / "config.yaml"
    if (
        cfg.ckpt_path != "auto"
        or not results.exists()
        or not config.exists()
        or not (folder / "report.html").exists()
        or results.stat().st_mtime < checkpoint.stat().st_mtime
        or not inspect(checkpoint).get(RUN_KEY, {}).get("finished")
    ):
        return None
    before, now = OmegaConf.load(config), OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    keys = ("evals", "scoring", "trainer.max_epochs", "trainer.max_steps")
    if any(OmegaConf.select(before, key) != OmegaConf.select(now, key) for key in keys):
        return None
    scores = json.loads(results.read_text())
    if is_first_process():
        os.utime(results)  # a sweep counts a job as done by the time of its results
        print_results(scores)
        print(f"this run is finished, its scores are in {results}: ckpt_path=null trains anew", flush=True)
    return scores


def write_results(
    folder: Path, results: dict[str, float], not_run: dict[str, str], seen: dict[str, int] | None = None
) -> None:
    """Writes `results.json`, `not_run.json` (why a score is missing) and the report, and prints the scores.

    Args:
        seen: samples and tokens that the model was trained on, for `environment.json`.
    """
    from coca_lit.files import atomic_write
    from coca_lit.report.write import write_report

    environment = json.loads((folder / "environment.json").read_text())
    environment["seconds"] = round(time.time() - environment["started"])
    environment |= seen or {}
    (folder / "report.html").unlink(missing_ok=True)  # its presence tells that all of this was done
    atomic_write(folder / "environment.json", _json(environment))
    atomic_write(folder / "results.json", _json(results))
    atomic_write(folder / "not_run.json", _json(not_run))
    print_results(results)
    write_report(folder)
    print(f"{environment['seconds']} seconds; everything is in {folder}, to be seen in report.html")


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


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
    """Commit of the checkout, marked if files differ from it; empty outside a checkout.

    Nothing here locks the repository, as `git describe --dirty` does: stopped by the timeout it would leave it locked.
    """
    try:
        changed = _git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
        return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    git = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


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
