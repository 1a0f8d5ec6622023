"""What this process may use of a machine: it may be less than all, and other programs may run there. And whether it
is the first process of its run.
"""

import os
import random
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

# How often a thread of OpenMP looks again before it sleeps, while it waits for the others. libgomp's own value keeps a
# core busy for milliseconds, which costs as many when another program wants it.
SPINS = "20000"
LOOK = 2.0  # seconds between two looks at what other programs use
CROWDED, FREE = 0.4, 0.2  # cores that are missing for all threads: make room, and spread again


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


class SharedCores(threading.Thread):
    """Keeps the threads of this process from waiting for a core that another program has.

    The threads of a parallel region wait for each other. When one of them has lost its core, the others wait for a turn
    of the scheduler, thousands of times in a training step. So while other programs leave fewer cores than PyTorch has
    threads, all threads share the cores that are left, and sleep at once when they wait. Results stay the same to the
    last bit: the number of threads, which divides the work, does not change.

    Attributes:
        cores: that this process may use.
        taken: cores that data workers and other programs used when it looked last.
        crowded: whether the threads share fewer cores than there are.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.taken, self.crowded = 0.0, False
        self.cores = self._used = sorted(os.sched_getaffinity(0))
        self._random = random.Random(os.getpid())
        self._spread_again = threading.Event()
        os.register_at_fork(after_in_child=self._in_child)

    def run(self) -> None:
        import torch

        before = _busy(), time.process_time(), time.monotonic()
        while True:
            time.sleep(LOOK)
            now = _busy(), time.process_time(), time.monotonic()
            seconds = now[2] - before[2]
            here = (now[1] - before[1]) / seconds / len(self._used)
            taken = {
                core: (now[0][core] - before[0][core]) / seconds - here * (core in self._used) for core in self.cores
            }
            before = now
            self.taken = max(0.0, sum(taken.values()))
            threads = torch.get_num_threads()
            missing = threads + self.taken - len(self.cores)
            if threads > 1 and missing > (FREE if self.crowded else CROWDED):
                count = max(1, len(self.cores) - round(self.taken))
                if self.crowded and count == len(self._used) and self._random.random() < 0.5:
                    continue  # two processes must not move together for ever
                # Only for a better place, as a move costs caches.
                load = {core: taken[core] - 0.3 * (core in self._used) for core in self.cores}
                order = sorted(self.cores, key=lambda core: (load[core], self._random.random()))
                was_crowded, self.crowded = self.crowded, True
                self._pin(order[:count])
                if not was_crowded:  # last, since a new thread takes over the cores of this one
                    self._spread_again.clear()
                    threading.Thread(target=self._sleep_at_once, daemon=True).start()
            elif self.crowded:
                self.crowded = False
                self._spread_again.set()
                self._pin(self.cores)

    def _sleep_at_once(self) -> None:
        """While libgomp manages more threads than there are cores, a thread looks a hundred times before it sleeps
        (`gomp_throttled_spin_count_var`, read by `do_spin` in its config/linux/wait.h). A second team makes them more.
        """
        import torch

        torch.ones(2**20).mul_(1)
        self._spread_again.wait()

    def _pin(self, cores: Collection[int]) -> None:
        self._used = sorted(cores)
        for thread in os.listdir("/proc/self/task"):
            with suppress(OSError):  # it has ended, or a container has fewer cores than before
                os.sched_setaffinity(int(thread), cores)

    def _in_child(self) -> None:
        """A data worker may use every core."""
        if self.crowded:
            with suppress(OSError):
                os.sched_setaffinity(0, self.cores)


@cache
def shared_cores() -> SharedCores | None:
    """The watch of this process, which starts with the first call; None where the system does not tell (Linux does)."""
    if not (hasattr(os, "sched_setaffinity") and os.sched_getaffinity(0) <= _busy().keys()):  # or counts other cores
        return None
    watch = SharedCores()
    watch.start()
    return watch


def _busy() -> dict[int, float]:
    """Core → seconds in which it ran something, or another virtual machine had it, since the machine started; see
    proc(5)."""
    found = {}
    for line in _text(Path("/proc/stat")).splitlines():
        name, *ticks = line.split()
        if name[3:].isdigit():
            user, nice, system, _, _, irq, softirq, steal = map(int, ticks[:8])
            found[int(name[3:])] = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # is not there; a thread has ended
        return ""
