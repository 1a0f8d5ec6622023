"""Sweeps on a Ray cluster of one node that `ray start` has started, see experiments/clusters."""

import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from experiments.slurm.requeues import free_port
from helpers.listening import descendants, interfaces, listens_here
from helpers.running import ROOT
from helpers.shard_jobs import RECAPTION, contents, shards_to_caption

pytestmark = pytest.mark.slow  # .ci/clusters runs them


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """With which `address=auto` finds the cluster."""
    pytest.importorskip("ray", reason="needs the extra [ray]")
    if interfaces() != {"lo"}:
        pytest.skip("Ray listens on all interfaces without authentication: use experiments/clusters/alone.sh")
    own = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "COLUMNS": "200", "RAY_AUTH_MODE": "disabled"}
    own["RAY_worker_niceness"] = "0"  # with Ray's default, 15, jobs would wait for every other program of the machine
    port = free_port()
    start = ("start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2", "--block")
    sizes = ("--object-store-memory=100000000", "--include-dashboard=false", "--disable-usage-stats")
    program, env = Path(sys.executable).with_name("ray"), os.environ | own
    with TemporaryDirectory(prefix="ray") as folder:  # a short path: it will hold sockets
        command = [program, *start, *sizes, f"--temp-dir={folder}"]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, cwd=folder, env=env, text=True, **output) as cluster:
            assert cluster.stdout is not None
            said = []
            for line in cluster.stdout:
                said.append(line)
                if "Ray runtime started" in line:
                    break
            else:  # as on a machine that allows no such daemons
                pytest.skip(f"Ray does not start: {' '.join(said[-3:])}")
            assert sum(map(listens_here, descendants(cluster.pid))) >= 3  # GCS, raylet, server of clients
            yield env | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
            cluster.terminate()


def test_a_sweep_of_which_jobs_are_killed(environment: dict[str, str], tmp_path: Path) -> None:
    """A job whose process dies is tried again, all others are awaited and shown; relative paths are the command's."""
    app = (sys.executable, str(ROOT / "tests" / "helpers" / "sweep_app.py"), "-m", "hydra/launcher=ray_jobs")
    settings = ("hydra.launcher.ray.init.address=auto", "hydra.launcher.ray.remote.max_retries=1")
    command = [*app, *settings, "model.optimizer.lr=0.1,109,2,0.3,209"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr
    sweep = tmp_path / "outputs" / "sweeps" / "demo"
    with (sweep / "results.csv").open(newline="") as file:
        rows = {row["model.optimizer.lr"]: row for row in csv.DictReader(file)}
    statuses = {rate: row["status"] for rate, row in rows.items()}
    assert statuses == {"0.1": "ok", "109": "failed", "2": "failed", "0.3": "ok", "209": "ok"}
    assert rows["109"]["error"].startswith("job 1: WorkerCrashedError")
    assert rows["2"]["error"] == "no model survives 2.0"
    assert "best scenes/CIDEr: 30.00" in done.stdout


def test_shards_of_which_a_worker_is_killed(environment: dict[str, str], tmp_path: Path) -> None:
    """`engine=ray`: the task of a dead worker starts again, and the bytes are those of one process."""
    expected = shards_to_caption(tmp_path)
    engine = ("engine=ray", "engine.ray.init.address=auto")
    command = (sys.executable, "-m", "coca_lit.tools.caption", *RECAPTION, *engine)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists()
    assert "6 shards: 6 done, 0 skipped (finished before), 0 failed" in done.stderr
    assert contents(tmp_path / "new") == expected
    data = ("-m", "coca_lit.tools.prepare", "score", "new", "checkpoint=tiny.safetensors", *engine)
    score = [sys.executable, *data]
    done = subprocess.run(score, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert "scoring 6 shards: 6 done, 0 skipped (finished before), 0 failed" in done.stderr, done.stderr
    assert len([*(tmp_path / "new").glob("*.scores.parquet")]) == 6
