"""Batches ahead of the computation: worker processes make them, and a GPU gets the next one while it computes."""

import multiprocessing
import os
import re
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import Tensor

from coca_lit.data.batch import Batch
from coca_lit.errors import DataError
from coca_lit.machine import workers_start_at_once
from coca_lit.models.inputs import Input


def ahead_of(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches; for a GPU each is copied on a second stream while the one before it is computed."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    coming: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            sent = batch.to(device)
            arrival = torch.cuda.Event()
            arrival.record(stream)
        if coming is not None:
            yield _arrived(*coming)
        coming = sent, arrival
    if coming is not None:
        yield _arrived(*coming)


def _arrived(batch: Batch, arrival: torch.cuda.Event) -> Batch:
    here = torch.cuda.current_stream()
    here.wait_event(arrival)
    images = batch.images.rows if isinstance(batch.images, Input) else batch.images
    for x in (images, batch.tokens, *batch.extras.values()):
        if isinstance(x, Tensor) and x.device.type == "cuda":
            x.record_stream(here)  # its memory is not for the other stream before this one is done with it
    return batch


def ignore_signals(worker: int) -> None:
    """For DataLoader workers: a scheduler signals every process of a job, but training needs its workers until it has
    saved. They end with the training process, see `_end_workers`.
    """
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
        number = getattr(signal, name, None)
        if number:  # Windows lacks some
            signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """When a process exits, perhaps by an error, multiprocessing sends SIGTERM to its workers and waits for them:
    forever, as they ignore signals.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report their end as a failure
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


@cache
def _end_workers_with(process_id: int) -> None:
    Finalize(None, _end_workers, exitpriority=0)  # before multiprocessing's own; forked processes do not inherit it


@contextmanager
def worker_errors() -> Iterator[None]:
    """Says in one sentence that a data worker was killed, or has no room for a batch. PyTorch raises that wherever the
    main process just is, or a connection breaks while the worker hands over a batch.

    Raises:
        DataError: in place of that error.
    """
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:
        if re.search(r"shared memory.*No space left|Bus error", str(error)):  # the file system is full, or the file
            raise DataError(
                "/dev/shm, through which data workers send batches, is full: give a container --ipc=host or "
                "--shm-size=16g, or use fewer workers"
            ) from error
        found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed by signal|exited)", str(error))
        if found is None and isinstance(error, RuntimeError):
            raise
        which = f" (process {found[1]})" if found is not None else ""
        raise DataError(
            f"a data worker{which} ended or was killed, usually because memory ran out: use fewer workers "
            "(data.num_workers, scoring.workers, num_workers); the same command resumes"
        ) from error


def worker_options(num_workers: int) -> dict[str, Any]:
    """The arguments that all DataLoaders share. Each worker prepares two batches ahead (torch's default); with a GPU
    they are put into pinned memory, so that the copy to the device overlaps with the computation.

    Linux forks workers, as Python before 3.14 did by itself. Its fork server would be ended by a scheduler's signal,
    and its workers with it; each of them takes seconds and half a gigabyte for PyTorch.
    """
    if num_workers:
        _end_workers_with(os.getpid())
    return {
        "num_workers": num_workers,
        "worker_init_fn": ignore_signals,
        "pin_memory": torch.cuda.is_available(),
        "multiprocessing_context": "fork" if num_workers and workers_start_at_once() else None,
    }
