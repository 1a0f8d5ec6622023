"""A rank that ends while Lightning trains on several of its own processes."""

import signal
import subprocess
import sys

import pytest

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
