"""Signals that come while a process trains more than once."""

import signal
from types import SimpleNamespace
from typing import Any

import pytest

from coca_lit.runs.signals import Signals


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
