"""A rank that ends while Lightning trains on several of its own processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coca_lit.errors import TrainingError
from coca_lit.training.lightning_fixes import error_of_an_ended_rank
from experiments.faults.victim import children
from helpers.parallel import SHARDED, SHORT, saved
from helpers.running import ROOT

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
    _, said = killed.communicate(timeout=300)
    assert killed.returncode not in (0, None)
    assert "error: rank 1 was ended by SIGKILL" in said
    assert "Traceback" not in said
    for name in ("killed", "whole"):
        again = start(tmp_path / name)
        _, said = again.communicate(timeout=600)
        assert again.returncode == 0, said
    found, expected = (saved(tmp_path / name) for name in ("killed", "whole"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step"):
        torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)
