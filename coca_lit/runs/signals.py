"""Signals that ask a run to stop. While it trains they are only recorded, and handled between two steps, by all ranks
together: a handler that acted at once could find the weights half updated or a collective half done.

SIGTERM            save, exit with 143 (what a shell reports for a process that SIGTERM ended), under submitit too
SIGINT             the same with 130; a second Ctrl-C stops at once
SIGHUP             the same with 129: the terminal is gone, and output with it; not under nohup
SIGUSR1 on SLURM   save, `scontrol requeue`, exit with 143     (#SBATCH --signal=USR1@90)
under submitit     save, then submitit's own handler, which requeues

Scores may take longer than SLURM waits: if no step ends in `LATE` seconds, or until shortly before the end of the job,
it is requeued without another checkpoint.

Before training there is nothing to save. SLURM's warning would end a process that is still importing packages, and the
job with it, so it requeues the job from the first moment on.
"""

import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from coca_lit.machine import is_first_process

if TYPE_CHECKING:  # the commands import this file first
    import lightning.pytorch as L

log = logging.getLogger(__name__)

LATE = 60.0  # seconds after SLURM's warning until the job is requeued from the last checkpoint, as within long scores
_HANGUP = getattr(signal, "SIGHUP", None)
_EXIT_CODES = {number: 128 + number for number in (signal.SIGINT, signal.SIGTERM, _HANGUP) if number is not None}
BEFORE_END = 45.0  # seconds: not earlier than this before the end of the job, where SLURM tells it


def slurm_signal() -> int | None:
    """The number of the signal by which SLURM announces the end of a job; None outside SLURM."""
    return getattr(signal, "SIGUSR1", None) if "SLURM_JOB_ID" in os.environ else None


def requeue_while_starting() -> None:
    """Answers the signal until training listens: the job is requeued, and SLURM ends it."""
    number = slurm_signal()
    if number is not None:
        signal.signal(number, requeue_once)


def requeue_once(number: int, frame: FrameType | None) -> None:
    """The handler of that time."""
    signal.signal(number, signal.SIG_IGN)
    if is_first_process():
        requeue()


def requeue() -> bool:
    """Asks SLURM to run this job again under its number, and returns whether it will; called by one process of it."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        problem = done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        log.warning("could not requeue job %s (%s): submit it again by hand, it will resume", job, problem)
    else:
        print(f"requeued job {job}", file=sys.stderr, flush=True)
    return not problem


class Signals:
    """Takes over the signals above from their handlers; `received` is the first that came, 0 for none."""

    def __init__(self) -> None:
        self.received = 0
        self._late: threading.Timer | None = None  # requeues where no step ends in time
        self._requeued = False
        self.nothing_to_save = False  # then a signal is handled at once
        numbers: set[int | None] = {signal.SIGTERM, signal.SIGINT, slurm_signal()}
        if _HANGUP is not None and signal.getsignal(_HANGUP) is not signal.SIG_IGN:
            numbers.add(_HANGUP)
        if "SUBMITIT_EXECUTOR" in os.environ:
            numbers.add(signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"])
        self._others: dict[int, Any] = {number: signal.getsignal(number) for number in numbers if number is not None}

    def listen(self) -> None:
        """Called when training starts, after Lightning has set handlers of its own."""
        self.received = 0
        self.nothing_to_save = self._requeued = False  # also where the training before was stopped, in a notebook
        self._handle(dict.fromkeys(self._others, self._note))

    def release(self) -> None:
        """Restores the handlers."""
        self.cancel_requeue()
        self._handle({n: other if other is not None else signal.SIG_DFL for n, other in self._others.items()})

    def _handle(self, handlers: dict[int, Any]) -> None:
        if threading.current_thread() is threading.main_thread():  # to which alone Python delivers signals
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def answer(self, trainer: "L.Trainer", number: int) -> None:
        """Requeues or exits once all is saved, on all ranks at the same step. Returns if the run may continue."""
        self.received = 0
        self.cancel_requeue()
        other = self._others[number]
        if callable(other) and other is not requeue_once and number not in _EXIT_CODES:
            other(number, None)  # submitit: its preemption signal requeues and exits
            return
        if number == slurm_signal() and trainer.is_global_zero:
            self._requeue()
        trainer.strategy.barrier("stop")
        from lightning.pytorch.plugins.environments import LightningEnvironment

        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, LightningEnvironment) and trainer.local_rank != 0:
            # The first process kills those that Lightning started for it as soon as it sees one of them gone.
            parent = os.getppid()
            until = time.monotonic() + 20
            while os.getppid() == parent and time.monotonic() < until:
                time.sleep(0.05)
        self.nothing_to_save = True  # Lightning calls no `teardown` now, and a notebook goes on
        raise SystemExit(_exit_code(number))

    def _note(self, number: int, frame: FrameType | None) -> Any:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.nothing_to_save:
            other = self._others[number]
            if callable(other) and number != signal.SIGTERM:
                return other(number, frame)
            raise SystemExit(_exit_code(number))
        if number == _HANGUP:
            _write_nowhere()
        self.received = self.received or number
        if number == slurm_signal() and self._others[number] is requeue_once and is_first_process() and not self._late:
            end = float(os.environ.get("SLURM_JOB_END_TIME", 0))
            self._late = threading.Timer(max(LATE, end - time.time() - BEFORE_END), self._requeue)
            self._late.daemon = True
            self._late.start()
        return None

    def _requeue(self) -> None:
        if not self._requeued:
            self._requeued = True  # meanwhile the other thread does not ask
            self._requeued = requeue()

    def cancel_requeue(self) -> None:
        """Called when a step has ended, before what may take long is saved: then `answer` requeues."""
        if self._late is not None:
            self._late.cancel()
            self._late = None


def _exit_code(number: int) -> int:
    return _EXIT_CODES.get(number, 128 + signal.SIGTERM)


def _write_nowhere() -> None:
    """What is printed from here on is lost, where it went to a terminal: writing to one that is gone is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        if stat.S_ISCHR(os.fstat(output).st_mode):
            os.dup2(nowhere, output)
    os.close(nowhere)
