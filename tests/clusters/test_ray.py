"""Sweeps on a Ray cluster of one node that `ray start` has started, see experiments/clusters."""

import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from running import ROOT

pytestmark = pytest.mark.slow  # .ci/clusters runs them

PORT = "26379"


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """With which `address=auto` finds the cluster."""
    pytest.importorskip("ray", reason="needs the extra [ray]")
    own = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "COLUMNS": "200", "RAY_AUTH_MODE": "disabled"}
    start = ("start", "--head", f"--port={PORT}", "--num-cpus=2", "--include-dashboard=false", "--block")
    sizes = ("--object-store-memory=100000000", "--disable-usage-stats")
    program, env = Path(sys.executable).with_name("ray"), os.environ | own
    with TemporaryDirectory(prefix="ray") as folder:  # a short path: it will hold sockets
        command = [program, *start, *sizes, f"--temp-dir={folder}"]
        with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True) as cluster:
            assert cluster.stdout is not None
            assert any("Ray runtime started" in line for line in cluster.stdout)
            yield env | {"RAY_ADDRESS": f"127.0.0.1:{PORT}"}
            cluster.terminate()


def test_a_sweep_of_which_one_job_is_killed(environment: dict[str, str], tmp_path: Path) -> None:
    """All others are awaited and shown; relative paths start where the command runs, not at the cluster."""
    app = (sys.executable, str(ROOT / "tests" / "sweep_app.py"), "-m", "hydra/launcher=ray_jobs")
    settings = ("hydra.launcher.ray.init.address=auto", "hydra.launcher.ray.remote.max_retries=0")
    command = [*app, *settings, "model.optimizer.lr=0.1,109,2,0.3"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    sweep = tmp_path / "outputs" / "sweeps" / "demo"
    with (sweep / "results.csv").open(newline="") as file:
        rows = {row["model.optimizer.lr"]: row for row in csv.DictReader(file)}
    assert [rows[rate]["status"] for rate in ("0.1", "109", "2", "0.3")] == ["ok", "failed", "failed", "ok"]
    assert rows["109"]["error"].startswith("WorkerCrashedError")
    assert rows["2"]["error"] == "no model survives 2.0"
    assert "best scenes/CIDEr: 30.00" in done.stdout
