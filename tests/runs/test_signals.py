"""Signals that come while a process trains more than once."""

import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from coca_lit.runs import signals as module
from coca_lit.runs.signals import Signals, requeue_while_starting


def test_a_second_training_in_one_process_is_stopped_like_the_first() -> None:
    """As in a notebook, which goes on after `SystemExit`."""
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(barrier=lambda name: None))
    signals = Signals()
    try:
        for _ in range(2):
            signals.listen()
            assert not signals.received
            signal.raise_signal(signal.SIGTERM)
            assert signals.received == signal.SIGTERM  # noted for the next step, where all is saved
            with pytest.raises(SystemExit, match="143"):
                signals.answer(trainer, signals.received)
    finally:
        signals.release()


@pytest.mark.parametrize("in_time", [False, True])
def test_a_job_whose_step_does_not_end_is_requeued_all_the_same(monkeypatch: pytest.MonkeyPatch, in_time: bool) -> None:
    """As within the scores of many images."""
    asked = threading.Event()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(module, "LATE", 0.2)
    monkeypatch.setattr(module, "requeue", asked.set)
    before = signal.getsignal(signal.SIGUSR1)
    requeue_while_starting()
    signals = Signals()
    try:
        signals.listen()
        signal.raise_signal(signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1
        if in_time:
            signals.in_time()
        assert asked.wait(0.5 if in_time else 30) == (not in_time)
    finally:
        signals.release()
        signal.signal(signal.SIGUSR1, before)
