"""The training process of the soak: the usual command, plus the trouble that can only be made from within."""

import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from io import BytesIO
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

RANKS = "trainer.devices=2"  # of a run of two ranks
GRACE = 30  # seconds that torchrun gives the other ranks when one has failed
WRITES = {"os.rename", "os.remove", "os.symlink", "os.truncate"}  # audit events, besides "open"


class Trouble(NamedTuple):
    """What happens within a training process; nothing by default."""

    die_at_file: int | None = None  # SIGKILL at this file operation in the run folder
    emptied: bool = False  # and a file that was about to be written is empty by then
    die_in_save: tuple[int, float] | None = None  # SIGKILL in the n-th checkpoint, after this part of its bytes
    largest_file: int | None = None  # bytes after which writing a file fails
    free: int | None = None  # bytes that the disk says are free
    slow: float = 0.0  # seconds that opening a file takes at most
    seed: int = 0


def train(folder: Path, overrides: tuple[str, ...], data: Path, trouble: Trouble, training: Event) -> None:
    """What `python train.py OVERRIDES` does in a process of its own; what it says goes to FOLDER.log.

    Args:
        training: set from the beginning of training to its end.
    """
    os.setsid()  # so that it can be killed with or without its workers
    multiprocessing.set_start_method("fork", force=True)  # of workers, as usual; it was this process's own
    descriptor = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if RANKS in overrides:
        as_torchrun(2)
    import torch

    from experiments.faults.preload import THREADS

    if os.environ.get("RANK", "0") == "0":
        make(trouble, folder, data)
    from coca_lit.cli import train as cli
    from coca_lit.cli.command import compose
    from coca_lit.errors import UserError
    from coca_lit.runs import results

    torch.set_num_threads(1 if "RANK" in os.environ else THREADS)  # torchrun sets OMP_NUM_THREADS=1
    results.PAUSE = 1  # second between two tries to write the scores on a full disk
    _tell(training)
    cfg = compose("train", [f"output_dir={folder}", "name=soak", *overrides])
    try:
        cli.run(cfg)
    except UserError as error:
        sys.exit(f"error: {error}")


def as_torchrun(count: int) -> None:
    """Forks this many ranks, in each of which this returns, with what torchrun tells a process. The first process waits
    for them, passes SIGTERM on, ends the others when one fails, and then ends as the first that failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "TORCHELASTIC_RUN_ID": "soak"}
    told |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
    running: set[int] = set()
    for rank in range(count):
        if (pid := os.fork()) == 0:
            os.environ |= {name: str(value) for name, value in (told | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            return
        running.add(pid)

    def send(number: int) -> None:
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    signal.signal(signal.SIGTERM, lambda *_: send(signal.SIGTERM))
    signal.signal(signal.SIGALRM, lambda *_: send(signal.SIGKILL))
    failed: list[int] = []
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if code := os.waitstatus_to_exitcode(status):
            if not failed:
                send(signal.SIGTERM)
                signal.alarm(GRACE)
            failed.append(code)
    first = failed[0] if failed else 0
    if first < 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), -first)
    os._exit(first)


def children(process: int) -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:  # it has ended
        return []


def _tell(training: Event) -> None:
    import lightning.pytorch as L

    from coca_lit.cli import train as cli

    class Tell(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            training.set()

        def on_train_end(self, *_: Any) -> None:
            training.clear()

    build = cli.build_trainer

    def telling(*args: Any, **kwargs: Any) -> L.Trainer:
        trainer = build(*args, **kwargs)
        trainer.callbacks.append(Tell())  # type: ignore[attr-defined]  # Lightning sets it from elsewhere
        return trainer

    cli.build_trainer = telling


def make(trouble: Trouble, folder: Path, data: Path) -> None:
    if trouble.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (trouble.largest_file, resource.RLIM_INFINITY))
    if trouble.free is not None:
        usage = shutil.disk_usage(folder.parent)._replace(free=trouble.free)
        shutil.disk_usage = lambda path: usage
    if trouble.die_in_save is not None:
        _die_in_save(*trouble.die_in_save)
    if trouble.die_at_file is not None or trouble.slow:
        _watch_files(trouble, (str(folder), str(data)))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in_save(number: int, part: float) -> None:
    import torch

    save, calls = torch.save, iter(range(1, number + 1))

    def torn(obj: object, f: Any, *args: Any, **kwargs: Any) -> None:
        if next(calls, number) < number:
            return save(obj, f, *args, **kwargs)
        whole = BytesIO()
        save(obj, whole, *args, **kwargs)
        f.write(whole.getvalue()[: int(part * whole.tell())])
        f.flush()
        return die()

    torch.save = torn


def _watch_files(trouble: Trouble, folders: tuple[str, str]) -> None:
    """Python tells a hook about each file before it opens, renames, links or removes it."""
    run_folder, rng, parent = folders[0], random.Random(trouble.seed), os.getpid()
    operations = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal operations
        if event != "open" and event not in WRITES:
            return
        path = str(args[0])
        if trouble.slow and event == "open" and path.startswith(folders):
            time.sleep(rng.uniform(0, trouble.slow))
        if trouble.die_at_file is None or not path.startswith(f"{run_folder}/") or os.getpid() != parent:
            return
        operations += 1
        if operations == trouble.die_at_file:
            if trouble.emptied and event == "open" and args[1] in ("w", "wb"):
                with contextlib.suppress(OSError):
                    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
            die()

    sys.addaudithook(hook)
