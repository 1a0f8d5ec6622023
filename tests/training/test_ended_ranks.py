"""A rank that ends while Lightning trains on several of its own processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments.faults.victim import children
from helpers.parallel import SHARDED, SHORT, saved
from helpers.running import ROOT

MAIN = """
import os, subprocess, sys, time
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from coca_lit.cli.runtime import configure_libraries

configure_libraries(None)
ranks = [subprocess.Popen([sys.executable, "-c", program]) for program in ("import time; time.sleep(60)", sys.argv[1])]
_ChildProcessObserver(os.getpid(), ranks, sleep_period=0.1).start()
time.sleep(60)
"""


def test_one_sentence_names_the_rank() -> None:
    program = "import os; os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", MAIN, program], capture_output=True, text=True, timeout=50)
    assert done.returncode == -signal.SIGKILL
    assert re.search(r"rank: 2\] Child process with PID \d+ terminated with code -9", done.stderr)


def start(folder: Path) -> subprocess.Popen[str]:
    """A sharded training on two ranks; the first is this process."""
    words = (*SHORT, *SHARDED, "data.train_count=64", "callbacks.checkpoint.every_n_steps=1", f"hydra.run.dir={folder}")
    command = [sys.executable, str(ROOT / "train.py"), *words]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder.parent, env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the second rank in /proc")
def test_a_sharded_run_of_which_a_rank_is_killed_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    killed = start(tmp_path / "killed")
    while not (tmp_path / "killed" / "checkpoints" / "step_1.ckpt").exists():
        assert killed.poll() is None
        time.sleep(0.05)
    (rank,) = children(killed.pid)
    os.kill(rank, signal.SIGKILL)
    killed.communicate(timeout=300)
    assert killed.returncode not in (0, None)
    for name in ("killed", "whole"):
        again = start(tmp_path / name)
        _, said = again.communicate(timeout=600)
        assert again.returncode == 0, said
    found, expected = (saved(tmp_path / name) for name in ("killed", "whole"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step"):
        torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)
