"""Signals that come while a process trains more than once."""

import signal
import time
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


def test_the_end_of_the_terminal_saves_but_not_under_nohup() -> None:
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(barrier=lambda name: None))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    signals = Signals()
    try:
        signals.listen()
        signal.raise_signal(signal.SIGHUP)
        assert signals.received == signal.SIGHUP
        with pytest.raises(SystemExit, match="129"):
            signals.answer(trainer, signals.received)
        signals.release()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signals = Signals()
        signals.listen()
        signal.raise_signal(signal.SIGHUP)
        assert not signals.received
    finally:
        signals.release()
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("late", "end"), [(0.2, None), (0.2, 0.0), (600.0, None), (0.2, 600.0)])
def test_a_job_whose_step_does_not_end_is_requeued_once(
    monkeypatch: pytest.MonkeyPatch, late: float, end: float | None
) -> None:
    """As within the scores of many images: after a while, but not long before SLURM ends the job."""
    asked: list[None] = []
    for name in ("RANK", "SLURM_PROCID", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    if end is not None:
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + end))
    monkeypatch.setattr(module, "LATE", late)
    monkeypatch.setattr(module, "requeue", lambda: not asked.append(None))
    before = signal.getsignal(signal.SIGUSR1)
    requeue_while_starting()
    signals = Signals()
    try:
        signals.listen()
        signal.raise_signal(signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1
        timer = signals._late
        assert timer is not None
        if max(late, end or 0) > 1:
            assert timer.interval > 500
            signals.cancel_requeue()
            timer.join(30)
            assert not asked
        else:
            timer.join(30)
            assert len(asked) == 1
        trainer: Any = SimpleNamespace(strategy=SimpleNamespace(barrier=lambda name: None), is_global_zero=True)
        with pytest.raises(SystemExit):
            signals.answer(trainer, signal.SIGUSR1)
        assert len(asked) == 1
    finally:
        signals.release()
        signal.signal(signal.SIGUSR1, before)
