"""All tests of the folders `simulated` of projects, in one process with a GPU that is simulated on the CPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SIMULATED = Path(__file__).parent / "simulated"
OF_PROJECTS = sorted(SIMULATED.parents[1].glob("*/simulated"))
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the simulated GPU needs the compiler g++")
@pytest.mark.skipif(torch.version.cuda is not None, reason="the simulated GPU needs a CPU build of PyTorch")
@pytest.mark.parametrize(("kind", "tests"), [("cuda", OF_PROJECTS), ("mps", [SIMULATED / "test_apple.py"])])
def test_everything_works_on_a_simulated_gpu(kind: str, tests: list[Path]) -> None:
    paths = os.pathsep.join([str(SIMULATED), str(ROOT), os.environ.get("PYTHONPATH", "")])
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    # As a plugin that pytest loads first: the library has to be there before PyTorch, and so before any conftest.py.
    command = [sys.executable, "-m", "pytest", "-p", "simulated_gpu", "-p", "no:cacheprovider", "-n", "0", "-x", "-q"]
    done = subprocess.run(
        [*command, *map(str, tests)],
        cwd=ROOT,
        env=inherited | {"PYTHONPATH": paths, "COCA_SIMULATED": kind},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
