"""What tests of projects share."""

import sys
from pathlib import Path

import pytest

# Tests on a simulated GPU need a process of their own, which `gpu_check/test_simulation.py` starts.
collect_ignore_glob = [] if "simulated_gpu" in sys.modules else ["*/simulated"]


@pytest.fixture(scope="module")
def forged_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for a module that forges files."""
    return tmp_path_factory.mktemp("fuzz")
