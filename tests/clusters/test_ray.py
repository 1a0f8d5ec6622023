"""Sweeps on a Ray cluster of one node that `ray start` has started, see experiments/clusters."""

import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import ROOT

PORT = "26379"


@pytest.fixture
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """With which `address=auto` finds the cluster."""
    pytest.importorskip("ray", reason="needs the extra [ray]")
    program = Path(sys.executable).with_name("ray")
    folder = tmp_path_factory.mktemp("ray")
    own = {
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
        "RAY_ADDRESS": f"127.0.0.1:{PORT}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    start = ("start", "--head", f"--port={PORT}", "--num-cpus=2", "--include-dashboard=false", "--block")
    sizes = ("--object-store-memory=100000000", f"--temp-dir={folder}", "--disable-usage-stats")
    cluster = subprocess.Popen([program, *start, *sizes], cwd=folder, stdout=subprocess.PIPE, text=True)
    assert cluster.stdout is not None
    for line in cluster.stdout:
        if "Ray runtime started" in line:
            break
    yield os.environ | own
    cluster.terminate()
    cluster.wait(30)
    cluster.stdout.close()


def test_a_sweep_of_which_one_job_is_killed(environment: dict[str, str], tmp_path: Path) -> None:
    """All others are awaited and shown; relative paths are those of the command, not of the cluster."""
    app = (sys.executable, str(ROOT / "tests" / "sweep_app.py"), "-m", "hydra/launcher=ray_jobs")
    settings = ("hydra.launcher.ray.init.address=auto", "hydra.launcher.ray.remote.max_retries=0")
    command = [*app, *settings, "model.optimizer.lr=0.1,-9,2,0.3"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    sweep = tmp_path / "outputs" / "sweeps" / "demo"
    with (sweep / "results.csv").open(newline="") as file:
        rows = {row["model.optimizer.lr"]: row for row in csv.DictReader(file)}
    assert [rows[rate]["status"] for rate in ("0.1", "-9", "2", "0.3")] == ["ok", "failed", "failed", "ok"]
    assert rows["-9"]["error"].startswith("WorkerCrashedError")
    assert rows["2"]["error"] == "no model survives 2.0"
    assert "best scenes/CIDEr: 30.00" in done.stdout
