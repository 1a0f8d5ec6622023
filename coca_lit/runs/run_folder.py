"""The folder of a run: its files, of which this module writes the config and the environment of the run; how what an
earlier run left there is archived, or its logs rewound; and its lock, which lets one process at a time in.
"""

import csv
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig

from coca_lit.errors import ConfigError, DataError
from coca_lit.files import atomic_write, csv_line, has_ended, remove_leftovers, whole_lines, write_json
from coca_lit.machine import in_shell, is_first_process
from coca_lit.reading import check_inside, parse_json, printable, read_json
from coca_lit.runs.redaction import masked_yaml, redact

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
RESULTS = "results.json"
INTERVALS = "intervals.json"
DRAWS = "draws.npz"
CONDITIONS = "conditions.json"
ARCHIVED = re.compile(r"earlier_\d+")  # the folders of earlier runs in the folder of one that was started afresh
METRICS = "metrics.csv"
BAD_STEPS = "bad_steps.jsonl"
CHECKPOINTS = "checkpoints"
LINKS = ("last.ckpt", "best.ckpt", "earlier_best.ckpt")  # in the folder of checkpoints, to some of them
EARLIER = "earlier_results.json"  # of a run that went on
# What belongs to one run, as outputs/README.md lists it.
RUN_FILES = (
    *(CONFIG, RESULTS, EARLIER, INTERVALS, DRAWS, CONDITIONS, CHECKPOINTS, METRICS, BAD_STEPS),
    *("not_run.json", "curves.png", "report.html", "report.md"),
    *("bad_samples", "predictions", "samples"),
    *("tensorboard", "wandb", "wandb_run"),
    ENVIRONMENT,  # the last one to be archived: it shows that a run wrote the others
)
NEWEST = "auto"  # as `ckpt_path`: the newest checkpoint in the run folder, if it has one
LOCK = ".lock"
HOLDER = ".lock.json"
EARLIER_SECONDS = "earlier_seconds"  # there too, of a run that resumed: how long its earlier starts took
JOBS = "jobs"  # in `environment.json`: in which the run was begun or resumed last
# What names a job that SLURM or torchrun may start again, with the same command: how often it did.
RESTARTS = {"SLURM_JOB_ID": "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID": "TORCHELASTIC_RESTART_COUNT"}
PATIENCE = 30.0  # seconds for the workers of a killed process to notice that it is gone
_began: float | None = None


def step_files(folder: Path) -> list[Path]:
    """The checkpoints `step_N.ckpt` of a folder, files or folders themselves, the newest first."""
    found = [path for path in folder.glob("*") if re.fullmatch(r"step_\d+\.ckpt", path.name)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step_")), reverse=True)


def restarted() -> list[str]:
    """The variables that name a job which has been started again; torchrun calls those without a name "none"."""
    again = [name for name, count in RESTARTS.items() if os.environ.get(count, "0") != "0"]
    return [name for name in again if os.environ.get(name, "none") != "none"]


def add_to_environment(folder: Path, further: dict[str, Any]) -> dict[str, Any]:
    """Adds what is known by now to `environment.json`; returns all of it."""
    path = folder / ENVIRONMENT
    known = read_json(path, dict) if path.exists() else environment()  # the folder may have been deleted
    known |= further
    write_json(path, known)
    return known


def seconds_so_far(folder: Path) -> float:
    """How long a run has taken with its earlier starts, each until the checkpoint that the next one resumed from; 0
    where its `environment.json` is gone.
    """
    try:
        known = read_json(folder / ENVIRONMENT, dict)
    except DataError:
        return 0.0
    return time.time() - known["started"] + known.get(EARLIER_SECONDS, 0.0)


def begin_at(seconds: float) -> None:
    """Notes when the command, or a job of its sweep, began: `environment` says so, and the run counts from there."""
    global _began
    _began = seconds


def environment() -> dict[str, Any]:
    """What a number depends on: command, commit, machine, versions; and the job, if any."""
    known: dict[str, Any] = {"command": command(), "commit": commit(), "machine": machine()}
    jobs = {name: os.environ[name] for name in RESTARTS if name in os.environ}
    if jobs:
        known[JOBS] = jobs
    known["python"] = platform.python_version()
    for package in ("torch", "lightning", "timm", "hydra-core"):
        known[package] = version(package)
    known["started"] = _began if _began is not None else time.time()
    return known


def command(words: Sequence[str] | None = None) -> str:
    """The command that started this process, without secrets, as typed in a shell.

    Args:
        words: other ones than those that it was given.
    """
    path = Path(sys.argv[0])
    program = ["python", path.name] if path.suffix == ".py" else [path.name]  # or coca-train
    if path.parent.name == "cli":  # python -m coca_lit.cli.evaluate
        program = [f"coca-{path.stem}"]
    return redact(in_shell([*program, *(sys.argv[1:] if words is None else words)]))


def commit() -> str:
    """Commit of the checkout, marked if files differ from it; empty outside a checkout, also where the package is
    installed within somebody's repository.

    Nothing here locks the repository, as `git describe --dirty` does: the timeout would leave it locked.
    """
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
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
    names = re.findall(r"^model name\s*: (.+)", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


# Its lock


@contextmanager
def in_use(folder: Path, output: str | None = None) -> Iterator[None]:
    """Holds a run folder, or a folder that stands for another output, within the block; another process that wants it
    is refused. Only the first process of a run holds it.

    The lock is one of the operating system (`filelock.FileLock`, that is flock), because the system drops it with the
    process: after `kill -9`, and when a job is requeued on another machine, nothing is left to clean up. NFS 4 and
    Lustre carry it between machines. `SoftFileLock`, a file that merely exists, would outlive its process, and by
    filelock's documentation is recognised as stale only on the machine that made it; `FileLock` falls back to it where
    a file system has no flock.

    Raises:
        ConfigError: another process holds the folder, it cannot be written, or its name controls a terminal.
    """
    if not is_first_process():
        yield
        return
    name = os.path.relpath(folder)
    if printable(name) != name:  # it is printed
        raise ConfigError(f"the folder '{printable(name)}' has characters that control a terminal: choose another")
    lock = FileLock(folder / LOCK)
    output = output or f"the run folder {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _acquire(lock, folder, output)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror or error}") from error
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    held = inode(folder / LOCK)
    try:
        with suppress(DataError):  # on a full disk the name is missing, and the lock holds all the same
            write_json(folder / HOLDER, holder)
        yield
    finally:
        with suppress(OSError):
            if _holder(folder) == holder:
                (folder / HOLDER).unlink()
            # Not another process's; a SoftFileLock, which is not empty, removes its file itself.
            if inode(folder / LOCK) == held and not os.path.getsize(folder / LOCK):
                os.unlink(folder / LOCK)
        lock.release()
        with suppress(OSError):
            folder.rmdir()  # of a run that could not start


def inode(path: Path) -> int | None:
    """The number of a file, which no other file gets while it is open; None if there is none."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _acquire(lock: FileLock, folder: Path, output: str) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = _holder(folder)
        try:
            lock.acquire(timeout=PATIENCE if _ended(holder) else 0)
        except Timeout as error:
            process, host, since = (holder.get(key, "unknown") for key in ("process", "host", "since"))
            raise ConfigError(
                f"{output} is in use by process {process} on {host} since {since}: wait until it ends, or choose"
                " another name"
            ) from error


def _holder(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / HOLDER, dict)
    except DataError:  # not written yet, or on a full disk not at all
        return {}


def _ended(holder: dict[str, Any]) -> bool:
    """Whether the process that took the lock is gone, and only processes that it started still hold it."""
    process = holder.get("process")
    return holder.get("host") == socket.gethostname() and isinstance(process, int) and has_ended(process)


# Its beginning: what an earlier run left is archived, or its logs end where the run resumes


def start_run_folder(
    cfg: DictConfig,
    resumed: Mapping[str, Any] | None = None,
    experiment: str | None = None,
    chosen: Sequence[str] = (),
) -> None:
    """Writes `config.yaml` and `environment.json`. Of an earlier run all files are archived, or its logs are rewound.

    Args:
        resumed: what the checkpoint in this folder from which the run resumes says about it, see `ResumePoint.run`.
        experiment: its name, for `environment.json`.
        chosen: what its recipe chose and why, for the same file; a run that resumes keeps what it says.

    Raises:
        ConfigError, DataError: the folder holds files of these names that no run wrote, or see `check_links`.
    """
    if not is_first_process():
        return
    folder = Path(cfg.output_dir)
    if resumed is None:
        check_is_run(folder)
    check_links(folder)
    for place in (folder, folder / CHECKPOINTS):
        remove_leftovers(place)
    if resumed is None:
        start_fresh(folder)
    else:
        rewind_run(folder, resumed)
    if (folder / RESULTS).exists():  # of other weights: until the run ends, it has no scores
        os.replace(folder / RESULTS, folder / EARLIER)
        print(f"the scores so far are in {folder / EARLIER}", flush=True)
    known = environment()
    if experiment:
        known["experiment"] = experiment
    if resumed is not None:
        known[EARLIER_SECONDS] = round(resumed.get("seconds", 0))
    if resumed is not None and not chosen and (folder / ENVIRONMENT).exists():
        chosen = read_json(folder / ENVIRONMENT, dict).get("chosen", ())
    if chosen:
        known["chosen"] = list(chosen)
    write_json(folder / ENVIRONMENT, known)  # the first one, see `check_is_run`
    atomic_write(folder / CONFIG, masked_yaml(cfg).encode())


def check_is_run(folder: Path) -> None:
    """Raises `ConfigError` if a folder holds files with names of a run's, and no run wrote them."""
    found = [name for name in RUN_FILES if os.path.lexists(folder / name)]
    if found and not is_of_run(folder):
        raise ConfigError(
            f"{folder} holds {', '.join(found)}, and no {ENVIRONMENT} that a run of coca_lit wrote: choose another name"
        )


def check_links(folder: Path) -> None:
    """Raises `DataError` if a file of a run is a link out of its folder: the run would read, write or delete elsewhere.
    `ConfigError` if a folder has the name of a link that the run renews: the run neither removes nor moves it.
    """
    links = [folder / CHECKPOINTS / name for name in LINKS]
    for path in (*(folder / name for name in RUN_FILES), *step_files(folder / CHECKPOINTS), *links):
        check_inside(path, folder, "for another disk name the whole run's folder there, hydra.run.dir=FOLDER")
    for link in links:
        if link.is_dir() and not link.is_symlink():
            raise ConfigError(f"{link} is a folder, and no run wrote it: move it away, or choose another name")


def is_of_run(folder: Path) -> bool:
    """Whether a run wrote the `environment.json` of a folder."""
    try:
        return {"command", "started", "lightning"} <= read_json(folder / ENVIRONMENT, dict).keys()
    except DataError:
        return False


def rewind_run(folder: Path, resumed: Mapping[str, Any]) -> None:
    """Prepares the run folder for resuming from one of its checkpoints: its logs end there. Newer checkpoints are
    abandoned, because this one was named or they are damaged; left there, they would count as the last ones, which are
    kept.
    """
    step = resumed.get("step", 0)
    newer = [path for path in step_files(folder / CHECKPOINTS) if int(path.stem.removeprefix("step_")) > step]
    if newer:
        print(f"{len(newer)} newer checkpoints were moved to {archive(folder, newer)}", flush=True)
    rewind_logs(folder, resumed.get("logged_steps", 0), step, resumed.get("validating", False))


def start_fresh(folder: Path) -> None:
    """Empties a run folder without losing anything: what an earlier run left there is archived."""
    left = [folder / name for name in RUN_FILES if (folder / name).exists()]
    if step_files(folder / CHECKPOINTS) or (folder / RESULTS).exists():
        print(f"the earlier run in {folder} was moved to {archive(folder, left)}", flush=True)
    else:
        written = [folder / name for name in ("predictions", "samples") if (folder / name).exists()]
        if written:
            print(f"what an unfinished run wrote in {folder} was moved to {archive(folder, written)}", flush=True)
        rewind_logs(folder, 0, 0)  # it died before its first checkpoint, and the same steps are repeated


def archive(folder: Path, files: list[Path]) -> Path:
    """Moves files of a run into a new folder `earlier_N` within it."""
    number = 1
    while (target := folder / f"earlier_{number}").exists():
        number += 1
    for path in files:
        (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target / path.relative_to(folder))
    return target


def rewind_logs(folder: Path, logged_steps: int, step: int, validating: bool = False) -> None:
    """Drops log entries of steps that will be repeated, so that nothing is logged twice.

    Args:
        folder: the run folder.
        logged_steps: rows of metrics.csv are dropped from this value of the column `step` on.
        step: number of the first optimizer step that is repeated.
        validating: the validation after the last step is repeated, too.
    """
    metrics = folder / METRICS
    bad_steps = folder / BAD_STEPS
    if metrics.exists():
        rows = [*csv.reader(whole_lines(metrics))]
        header, *others = rows or [[]]
        column = header.index("step") if "step" in header else 0
        whole = [row for row in others if len(row) == len(header) and row[column].isdigit()]
        kept = [row for row in whole if int(row[column]) < logged_steps]
        if validating:  # the rows of that validation go, too
            measured = [i for i, name in enumerate(header) if name.startswith("val/")]
            last = logged_steps - 1
            kept = [*takewhile(lambda row: int(row[column]) < last or not any(row[i] for i in measured), kept)]
        rows = [header, *kept] if rows else []
        atomic_write(metrics, "".join(f"{csv_line(row)}\n" for row in rows).encode())
    if bad_steps.exists():
        lines = (line for line in whole_lines(bad_steps) if parse_json(line, str(bad_steps), dict)["step"] < step)
        atomic_write(bad_steps, "".join(lines).encode())
