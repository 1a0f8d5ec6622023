"""What this process may use of a machine, which may be less than all; whether it is the first process of its run."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# How often a thread of OpenMP looks again before it sleeps, while it waits for the others. libgomp's own value keeps a
# core busy for milliseconds, which costs as many when another program wants it.
SPINS = "20000"


def set_up_environment() -> None:
    """For the start of a program, as libraries read it when PyTorch loads them. Threads sleep that wait for others, and
    on macOS the CPU runs what Apple's GPUs have no kernel for; PyTorch says so for each such operation.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    if sys.platform == "darwin":
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")


def is_first_process() -> bool:
    """Whether this is rank 0, according to the environment: there may be no process group yet. Under `srun torchrun`
    RANK alone tells: torchrun numbers machines by their names, and not as SLURM does.
    """
    names = ("RANK",) if "RANK" in os.environ else ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)


def cache_folder() -> Path:
    """Where is kept what can be made or fetched again, by the XDG Base Directory Specification."""
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "coca_lit")


def workers_start_at_once() -> bool:
    """Whether data workers are forked. On macOS and Windows each imports PyTorch: seconds, and 0.3 GB."""
    return sys.platform == "linux"


def in_shell(words: Sequence[str]) -> str:
    """The words of a command as one types them here."""
    if os.name != "nt":
        return shlex.join(words)
    return " ".join(f'"{w}"' if set(w) & set("&|<>^") and " " not in w else subprocess.list2cmdline([w]) for w in words)


def best_device() -> str:
    """The kind of device that computes fastest here: "cuda", else Apple's "mps", else "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def processors(root: Path = Path("/")) -> int:
    """Cores that this process may use: those of its affinity, or fewer if a control group (v1 or v2, such as a
    container's) limits their time.

    Args:
        root: where /proc and /sys are.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = [allowed]
    for folder in _control_groups(root, "cpu"):
        text = (
            _text(folder / "cpu.max") or f"{_text(folder / 'cpu.cfs_quota_us')} {_text(folder / 'cpu.cfs_period_us')}"
        )
        quota, _, period = text.partition(" ")
        if quota.strip().isdigit() and period.strip().isdigit():  # not "max", not -1
            cores.append(int(int(quota) / int(period)))
    return max(1, min(cores))


def memory_bytes(root: Path = Path("/")) -> int:
    """Memory that this process may use: the machine's, or less if a control group limits it. `root` as above."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    names = ("memory.max", "memory.limit_in_bytes")  # v2, v1
    limits = [_text(folder / name) for folder in _control_groups(root, "memory") for name in names]
    return min([whole, *(int(limit) for limit in limits if limit.isdigit())])  # not "max"


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the groups around this process, its own first; cgroups(7) and the kernel's cgroup-v2.rst."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        group = mount / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # is not there
        return ""
