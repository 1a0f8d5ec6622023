"""Signals that ask a run to stop: recorded at once, handled between two steps, by all ranks together.

A handler that acted at once could find the weights half updated or a collective half done. So it only records the
signal, and a second one changes nothing.

SIGTERM            save, exit with 143 (what a shell reports for a process that SIGTERM ended), under submitit too
SIGINT             the same with 130; a second Ctrl-C stops at once
SIGUSR1 on SLURM   save, `scontrol requeue`, exit with 143     (#SBATCH --signal=USR1@90)
under submitit     save, then submitit's own handler, which requeues
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.plugins.environments import LightningEnvironment

from coca_lit.runs.signals import requeue, requeue_once, slurm_signal


class Signals:
    """Takes over the signals above from their handlers; `received` is the first that came, 0 for none."""

    def __init__(self) -> None:
        self.received = 0
        self.nothing_to_save = False  # then a signal is handled at once
        self._others: dict[int, Any] = {number: signal.getsignal(number) for number in _wanted()}

    def listen(self) -> None:
        """Called when training starts, after Lightning has set handlers of its own."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread alone
        for number in self._others:
            signal.signal(number, self._note)

    def release(self) -> None:
        """Restores the handlers."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._others.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def answer(self, trainer: L.Trainer, number: int) -> None:
        """Requeues or exits once all is saved, on all ranks at the same step. Returns if the run may continue."""
        self.received = 0
        other = self._others[number]
        if callable(other) and other is not requeue_once and number not in (signal.SIGINT, signal.SIGTERM):
            other(number, None)  # submitit: its preemption signal requeues and exits
            return
        if number == slurm_signal() and trainer.is_global_zero:
            requeue()
        trainer.strategy.barrier("stop")
        if _started_by_lightning(trainer):
            _wait_for_first_process()  # which Lightning kills as soon as it sees one of us gone
        raise SystemExit(_exit_code(number))

    def _note(self, number: int, frame: FrameType | None) -> Any:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.nothing_to_save:
            if callable(other := self._others[number]) and number != signal.SIGTERM:
                return other(number, frame)
            raise SystemExit(_exit_code(number))
        self.received = self.received or number
        return None


def _wanted() -> set[int]:
    wanted: set[int] = {signal.SIGTERM, signal.SIGINT}
    if (number := slurm_signal()) is not None:
        wanted.add(number)
    if "SUBMITIT_EXECUTOR" in os.environ:
        wanted.add(signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"])
    return wanted


def _exit_code(number: int) -> int:
    return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def _started_by_lightning(trainer: L.Trainer) -> bool:
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and trainer.local_rank > 0


def _wait_for_first_process(seconds: float = 20.0) -> None:
    parent, until = os.getppid(), time.monotonic() + seconds
    while os.getppid() == parent and time.monotonic() < until:
        time.sleep(0.05)
