"""What a run leaves behind besides checkpoints and logs: its config, its environment and its results."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from coca_lit.files import atomic_write, remove_leftovers
from coca_lit.reading import read_json
from coca_lit.runs.checkpoint_io import inspect
from coca_lit.runs.launch import is_first_process
from coca_lit.runs.redaction import masked_yaml, redact
from coca_lit.runs.resume import AUTO, CHECKPOINTS, RUN_KEY, resume, start_fresh

CONFIG, ENVIRONMENT, RESULTS = "config.yaml", "environment.json", "results.json"


def start_run_folder(cfg: DictConfig, checkpoint: Path | None = None, **facts: Any) -> None:
    """Writes `config.yaml` and `environment.json`. Values from environment variables are written as references: no
    secret ends up in a file. The logs of an earlier run are rewound to `checkpoint`; without one, all its files are
    archived.

    Args:
        facts: for `environment.json`, in addition to `environment`'s.
    """
    if not is_first_process():
        return
    folder = Path(cfg.output_dir)
    for place in (folder, folder / CHECKPOINTS):
        remove_leftovers(place)
    if checkpoint is None:
        start_fresh(folder)
    else:
        resume(folder, checkpoint, roll_back=cfg.ckpt_path != AUTO)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / CONFIG, masked_yaml(cfg).encode())
    atomic_write(folder / ENVIRONMENT, _json(environment() | facts))


def resumes(cfg: DictConfig, checkpoint: Path | None) -> bool:
    """Whether this is the run that the folder holds: it goes on at its checkpoint, or begins again with the same config
    because it died before its first one.
    """
    config = Path(cfg.output_dir) / CONFIG
    unchanged = config.exists() and config.read_text() == masked_yaml(cfg)
    return cfg.ckpt_path == AUTO and (checkpoint is not None or unchanged)


def finished_results(cfg: DictConfig, checkpoint: Path) -> dict[str, float] | None:
    """The scores of a run that is finished and was scored as `cfg` asks for; None if there is something left to do.

    A full disk may have cost the last checkpoint, and a kill the report: then there is.
    """
    folder = Path(cfg.output_dir)
    results, config = folder / RESULTS, folder / CONFIG
    if (
        cfg.ckpt_path != AUTO
        or not results.exists()
        or not config.exists()
        or not (folder / "report.html").exists()
        or results.stat().st_mtime < checkpoint.stat().st_mtime
        or not inspect(checkpoint).get(RUN_KEY, {}).get("finished")
    ):
        return None
    before, now = OmegaConf.load(config), OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    for read in (before, now):
        OmegaConf.update(read, "scoring.objective", None)  # which ranks the scores and computes none
    keys = ("evals", "scoring", "trainer.max_epochs", "trainer.max_steps", "trainer.max_time")
    if any(OmegaConf.select(before, key) != OmegaConf.select(now, key) for key in keys):
        return None
    scores = read_json(results, dict)
    if is_first_process():
        os.utime(results)  # a sweep counts a job as done by the time of its results
        print(f"this run is finished, its scores are in {results}; ckpt_path=null trains again", flush=True)
    return scores


def write_results(
    folder: Path, results: dict[str, float], not_run: dict[str, str], facts: dict[str, Any] | None = None
) -> int:
    """Writes `results.json` and `not_run.json` (why a score is missing); returns the seconds that the run took. It is
    finished once the report is written, too.

    Args:
        facts: for `environment.json`: parameters of the model, samples and tokens that it was trained on.
    """
    (folder / "report.html").unlink(missing_ok=True)  # of an earlier scoring
    known = add_facts(folder, facts or {})
    seconds = round(time.time() - known["started"])
    add_facts(folder, {"seconds": seconds})
    atomic_write(folder / RESULTS, _json(results))
    atomic_write(folder / "not_run.json", _json(not_run))
    return seconds


def add_facts(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Adds what is known by now to `environment.json`; returns all of it."""
    path = folder / ENVIRONMENT
    known = (read_json(path, dict) if path.exists() else environment()) | facts  # the folder may have been deleted
    atomic_write(path, _json(known))
    return known


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def environment() -> dict[str, Any]:
    """What a number depends on: command, commit, machine, versions."""
    packages = ("torch", "lightning", "timm", "hydra-core")
    return {
        "command": command(),
        "commit": commit(),
        "machine": machine(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "started": time.time(),
    }


def command() -> str:
    """The command that started this process, without secrets, as typed in a shell."""
    return redact(shlex.join([*_program(Path(sys.argv[0])), *sys.argv[1:]]))


def resume_command(name: str) -> str:
    """The command that resumes this run: the same one, with the name that the run was given."""
    return (
        command()
        if any(word.startswith("name=") for word in sys.argv)
        else f"{command()} {shlex.quote(f'name={name}')}"
    )


def _program(path: Path) -> list[str]:
    """The words that start this program in a shell: coca-train, or python train.py."""
    if path.parent.name == "cli":  # python -m coca_lit.cli.train
        return [f"coca-{path.stem}"]
    return ["python", path.name] if path.suffix == ".py" else [path.name]


def commit() -> str:
    """Commit of the checkout, marked if files differ from it; empty outside a checkout.

    Nothing here locks the repository, as `git describe --dirty` does: the timeout would leave it locked.
    """
    try:
        changed = _git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
        return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    git = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def machine() -> str:
    """Its processor and number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
