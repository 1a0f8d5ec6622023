"""Work on a list of shards: in this process, or in a process for each core or GPU of this machine. A project adds other
engines by the config group `engine`, whose options name a class by `_target_`.

    engine=local | engine=gpus engine.devices=[0,1]

A command hands `Work` a picklable function `(shard, settings) -> result` that writes its output whole or not at all,
and the shards that are not finished yet. A process that dies starts again. What fails nevertheless is reported, and the
same command tries it again.
"""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, Protocol

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from coca_lit.cli.assembly import build
from coca_lit.cli.command import compose, explain
from coca_lit.errors import ConfigError, DataError, UserError
from coca_lit.machine import processors
from coca_lit.reading import printable

ATTEMPTS = 3  # at a shard whose process dies


class Runnable(Protocol):
    """A picklable job."""

    def __call__(self) -> Any: ...


class Engine(Protocol):
    """What runs picklable jobs, anywhere and in any order."""

    def run(self, jobs: Sequence[Runnable]) -> Iterator[tuple[int, Any]]:
        """As each job ends, its number and its result, or the reason (a str) why there is none."""


# Engines


class Machine:
    """This machine: the calling process, or one process for each device, which takes one job after another.

    Args:
        devices: `None` for the calling process, "auto" for all GPUs, "cores" for as many processes as there are cores
            (of a SLURM job: those it asked for), or a list such as `[0, 1]` or `["cpu", "cpu"]`.
    """

    def __init__(self, devices: str | Sequence[int | str] | None = None) -> None:
        listed = (
            isinstance(devices, Sequence)
            and not isinstance(devices, str)
            and all(d == "cpu" or (isinstance(d, int) and not isinstance(d, bool) and d >= 0) for d in devices)
        )
        if not (devices is None or devices in ("auto", "cores") or listed):
            raise ConfigError(f"engine.devices must be auto, cores, or a list of GPU numbers and cpu, got {devices!r}")
        self.devices = devices

    def run(self, jobs: Sequence[Runnable]) -> Iterator[tuple[int, Any]]:
        devices = self._found()[: len(jobs)]
        hides_gpus = self.devices not in (None, "cores") and _gpus() > 0  # which the calling process sees
        if not devices or (devices == ["cpu"] and not hides_gpus):
            yield from ((i, job()) for i, job in enumerate(jobs))
            return
        waiting = deque(range(len(jobs)))
        attempts = [0] * len(jobs)
        idle = deque((device, _process_on(device)) for device in devices)
        running: dict[Future[Any], tuple[int, int | str, ProcessPoolExecutor]] = {}
        try:
            while waiting or running:
                while waiting and idle:
                    i, (device, process) = waiting.popleft(), idle.popleft()
                    try:
                        running[process.submit(jobs[i])] = (i, device, process)
                    except BrokenProcessPool:  # it was killed while it was idle
                        waiting.appendleft(i)
                        idle.append((device, _process_on(device)))
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    i, device, process = running.pop(future)
                    if not isinstance(future.exception(), BrokenProcessPool):
                        idle.append((device, process))
                        yield i, future.result()
                        continue
                    idle.append((device, _process_on(device)))
                    attempts[i] += 1
                    if attempts[i] < ATTEMPTS:
                        waiting.append(i)
                    else:
                        yield i, f"its process was killed {ATTEMPTS} times, most often because memory ran out"
        finally:
            for process in [*(process for _, process in idle), *(process for *_, process in running.values())]:
                process.shutdown(cancel_futures=True)

    def _found(self) -> list[int | str]:
        if self.devices is None:
            return []
        if self.devices == "cores":
            return ["cpu"] * int(os.environ.get("SLURM_CPUS_PER_TASK") or processors())
        gpus = _gpus()
        found = [*range(gpus)] if self.devices == "auto" else [*self.devices]
        if not found or any(device != "cpu" and int(device) >= gpus for device in found):
            raise ConfigError(
                f"engine.devices={self.devices} does not fit a machine with {gpus} GPUs: name existing ones, use "
                "engine=local, or processes on the CPU (engine.devices=[cpu,cpu])"
            )
        return found


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _process_on(device: int | str) -> ProcessPoolExecutor:
    """A process that sees one device; it starts with its first job. CUDA does not survive a fork of the caller."""
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    visible = "" if device == "cpu" else names[int(device)] if names else str(device)
    kinds = multiprocessing.get_all_start_methods()  # Windows has one
    context = multiprocessing.get_context("forkserver" if "forkserver" in kinds else "spawn")
    return ProcessPoolExecutor(1, context, initializer=_begin, initargs=(visible,))


def _begin(visible: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = visible
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process of a pool would wait for jobs for ever if its parent is killed, and keep its GPU."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# Work


class Work:
    """A function over shards, with a progress bar, and in the end the count of what was done, skipped and failed.

    Args:
        doing: the activity, such as "checking".
    """

    def __init__(self, engine: Engine, doing: str) -> None:
        self.engine = engine
        self.doing = doing
        self.done = 0
        self.failed: dict[str, str] = {}  # shard -> reason

    def __call__(self, function: Callable[[Any, Any], Any], shards: Sequence[Any], settings: Any) -> Iterator[Any]:
        """The results of `function(shard, settings)`, as they are ready, of those shards that do not fail."""
        from coca_lit.progress import ProgressBar

        jobs = [_Job(function, shard, settings, os.getcwd(), os.getcwd() in sys.path) for shard in shards]
        if not jobs:  # then no cluster is needed
            return
        with ProgressBar(self.doing, "shards") as bar:
            bar.reach(0, len(jobs))
            for i, outcome in self.engine.run(jobs):
                bar.advance(1, (self.done + len(self.failed) + 1) / len(jobs))
                if isinstance(outcome, str):
                    self.failed[str(shards[i])] = outcome
                else:
                    self.done += 1
                    yield outcome

    def close(self, total: int, found: int = 0) -> None:
        """Prints what became of `total` shards, of which `Work` got those that were not finished before.

        Args:
            found: of those that it got, how many a process found to be finished.

        Raises:
            DataError: some failed.
        """
        for shard, reason in self.failed.items():
            print(printable(f"failed: {shard}: {reason}"), file=sys.stderr)
        done = self.done - found
        failed = len(self.failed)
        counts = f"{done:,} done, {total - done - failed:,} skipped (finished before), {failed:,} failed"
        print(f"{self.doing} {total:,} shards: {counts}", file=sys.stderr)
        if failed:
            raise DataError(f"{failed:,} of {total:,} shards failed: the same command tries them again")


class _Job(NamedTuple):
    function: Callable[[Any, Any], Any]
    shard: Any
    settings: Any
    folder: str  # relative paths are relative to it
    user_code: bool  # whether the config names modules in it

    def __call__(self) -> Any:
        os.chdir(self.folder)  # processes on other machines start elsewhere
        if self.user_code and self.folder not in sys.path:
            sys.path.append(self.folder)
        try:
            return self.function(self.shard, self.settings)
        except (UserError, OSError) as error:
            return str(error) or type(error).__name__
        except Exception as error:  # of one shard; the others continue
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"


def engine_from(words: Sequence[str], devices: str | Sequence[int | str] | None = None) -> Any:
    """The engine of a command without Hydra, from words such as engine=gpus and engine.devices=[0,1].

    Args:
        devices: of a `Machine` for which the words choose none.
    """
    if not words:
        return Machine(devices)
    try:
        cfg = compose("engine", words).engine
        if "devices" in cfg and cfg.devices is None:
            cfg.devices = devices
        return build(cfg, "engine")
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
