"""A rank that ends while Lightning trains on several of its own processes."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from coca_lit.errors import TrainingError
from coca_lit.training.lightning_fixes import error_of_an_ended_rank

MAIN = """
import os, signal, subprocess, sys, time
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from coca_lit.training.lightning_fixes import say_which_rank_ended

say_which_rank_ended()
say_which_rank_ended()
ranks = [subprocess.Popen([sys.executable, "-c", program]) for program in ("import time; time.sleep(60)", sys.argv[1])]
_ChildProcessObserver(os.getpid(), ranks, sleep_period=0.1).start()
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("program", "cause"),
    [
        ("import os; os.kill(os.getpid(), 9)", "rank 2 was ended by SIGKILL"),
        ("raise SystemExit(3)", "rank 2 failed with exit code 3"),
    ],
)
def test_one_sentence_names_the_rank(program: str, cause: str) -> None:
    done = subprocess.run([sys.executable, "-c", MAIN, program], capture_output=True, text=True, timeout=50)
    assert done.returncode == -signal.SIGKILL
    assert done.stderr.count("error: rank ") == 1
    assert cause in done.stderr


@contextmanager
def trainer_of(*programs: str) -> Iterator[Any]:
    """One whose launcher has started these programs as ranks 1, 2, …"""
    ranks = [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
    try:
        yield SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=ranks)))
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_a_connection_that_a_killed_rank_broke_names_the_rank() -> None:
    sleep, dies = "import time; time.sleep(60)", "import os; os.kill(os.getpid(), 9)"
    with trainer_of(sleep, dies) as trainer:
        trainer.strategy.launcher.procs[1].wait()
        with pytest.raises(TrainingError, match=r"^rank 2 was ended by SIGKILL"), error_of_an_ended_rank(trainer):
            raise RuntimeError("Connection closed by peer")


def test_an_error_is_as_it_was_while_all_ranks_live() -> None:
    with (
        trainer_of("import time; time.sleep(60)") as trainer,
        pytest.raises(RuntimeError, match=r"^a bug$"),
        error_of_an_ended_rank(trainer),
    ):
        raise RuntimeError("a bug")
