"""Training under a real SLURM of one node, see experiments/clusters: starts, refusals, signals, requeueing."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from experiments.slurm.requeues import LOGS, SCRIPT, SHORT, SIZES, Cluster, cluster, curve, differences, requeue
from helpers.listening import interfaces, listens_here
from helpers.running import ROOT
from helpers.shard_jobs import RECAPTION, contents, shards_to_caption

pytestmark = pytest.mark.slow  # .ci/clusters runs them

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The `slurm.conf` of a cluster that runs while the tests of this module do."""
    if shutil.which("slurmctld") is None or os.geteuid() != 0:
        pytest.skip("needs root and SLURM: apt-get install slurm-wlm munge")
    with ExitStack() as stack:
        try:
            config = stack.enter_context(cluster(tmp_path_factory.mktemp("slurm")))
        except RuntimeError as error:  # as on a machine that allows no such daemons
            pytest.skip(str(error))
        yield config


@pytest.fixture
def slurm(config: Path, tmp_path: Path) -> Cluster:
    """Commands start in an empty folder."""
    return Cluster(config, tmp_path)


@pytest.fixture
def call(slurm: Cluster) -> Call:
    return slurm.call


def test_the_daemons_are_reached_from_this_machine_alone(config: Path) -> None:
    assert interfaces() == {"lo"}
    for daemon in ("slurmctld", "slurmd"):
        assert listens_here(int((config.parent / f"{daemon}.pid").read_text()))


def test_a_network_with_other_interfaces_is_refused(config: Path, tmp_path: Path) -> None:
    another = 'ip link add other type veth && ip address add 198.51.100.2 dev other && exec "$@"'
    command = ("unshare", "--net", "bash", "-c", another, "-", SCRIPT, "start", tmp_path)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "alone.sh" in done.stderr
    assert not [*tmp_path.iterdir()]


def test_more_tasks_than_devices_are_refused(call: Call) -> None:
    done = call("srun", "--ntasks-per-node=2", sys.executable, str(ROOT / "train.py"), "trainer=smoke", *SIZES)
    assert done.returncode != 0
    assert "(trainer.devices=1)" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_job_is_requeued_while_it_starts_and_while_it_trains(slurm: Cluster, tmp_path: Path) -> None:
    """One log, one folder, one curve, and the bits of an undisturbed `srun --ntasks=2`, which gives no number of tasks
    per node; experiments/slurm does it ten times.
    """
    words = (*SIZES, *SHORT, *LOGS, "trainer.max_epochs=8")  # a signal is late on a busy machine
    job = slurm.submit(*words)
    requeue(job, 2)
    assert job.completes(), job.log()
    assert f"JobName=demo/{job.number} " in job.shown().replace("\n", " ")
    assert job.log().count("requeued job") == 2
    assert job.log().count("resuming after step") == job.log().count("stopping after step") == 1
    assert "on signal 15" not in job.log()  # which SLURM sends to those that have not ended by then
    said = job.log().partition("resume with: ")[2]  # unless SLURM ends the job before it says so
    assert not said or f"name=demo/slurm_{job.number}" in said.splitlines()[0]
    tasks = ("srun", "--ntasks=2", "--cpus-per-task=1", sys.executable, str(ROOT / "train.py"))
    done = slurm.call(*tasks, "experiment=demo", *words, "name=undisturbed")
    assert done.returncode == 0, done.stderr
    assert differences(job.run, tmp_path / "outputs" / "undisturbed") == ""
    assert len(curve(job.run)) == 64
    assert len([*tmp_path.glob("*.log")]) == 1


# Sweeps

ON_ONE_NODE = ("hydra/launcher=slurm_jobs", "hydra.launcher.cpus_per_task=1", "hydra.sweep.dir=sweep")
NO_GPUS = "hydra.launcher.gpus_per_node=null"


def rows_of(sweep: Path, key: str) -> dict[str, dict[str, str]]:
    with (sweep / "results.csv").open(newline="") as file:
        return {row[key]: row for row in csv.DictReader(file)}


def test_jobs_of_a_sweep_of_which_one_is_killed(call: Call, tmp_path: Path) -> None:
    """Two tasks each in one folder; all results are awaited and shown, the dead job with its reason."""
    pytest.importorskip("submitit")
    app = (sys.executable, str(ROOT / "tests" / "helpers" / "sweep_app.py"), "-m", *ON_ONE_NODE)
    rates = "model.optimizer.lr=0.1,109,2,0.3"
    done = call(*app, NO_GPUS, "hydra.launcher.tasks_per_node=2", "hydra.launcher.partition=all", rates)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    rows = rows_of(tmp_path / "sweep", "model.optimizer.lr")
    assert [rows[rate]["status"] for rate in ("0.1", "109", "2", "0.3")] == ["ok", "failed", "failed", "ok"]
    assert "state FAILED, killed by SIGKILL" in rows["109"]["error"]
    assert rows["2"]["error"] == "no model survives 2.0"
    numbers = {path.name.split("_")[0] for path in (tmp_path / "sweep").glob(".submitit/*/*.out")}
    shown = "".join(call("scontrol", "show", "job", number).stdout for number in numbers)
    assert sorted(re.findall(r"JobState=(\w+)", shown)) == ["COMPLETED", "COMPLETED", "FAILED", "FAILED"]
    assert len([*(tmp_path / "sweep" / "model.optimizer.lr=0.3").glob("rank[01].txt")]) == 2


def test_preempted_jobs_are_requeued_and_terminated_ones_stop(call: Call, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    app = (sys.executable, str(ROOT / "tests" / "helpers" / "preempted_app.py"), "-m", *ON_ONE_NODE, NO_GPUS)
    steps = ("trainer.max_epochs=1", "data.train_count=16", "data.batch_size=4")
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "tests"))
    done = call(*app, "seed=0,1", "trainer=cpu", *SIZES, *SHORT, *LOGS, *steps, PYTHONPATH=paths)
    assert done.returncode == 1
    assert "error: 1 of 2 jobs" in done.stderr
    rows = rows_of(tmp_path / "sweep", "seed")
    assert [rows[seed]["status"] for seed in "01"] == ["ok", "stopped"]
    said = [path.read_text() for path in sorted(tmp_path.glob("sweep/.submitit/*/*.out"))]
    assert "stopping after step 2 on signal 12: saved" in said[0]
    assert "resuming after step 2 in epoch 1, 8 samples seen" in said[0]
    assert "stopping after step 2 on signal 15: saved" in said[1]
    assert [[step for step, *_ in curve(tmp_path / "sweep" / f"seed={seed}")] for seed in "01"] == [
        ["0", "1", "2", "3"],
        ["0", "1"],
    ]


def test_gpus_that_no_node_has_are_one_sentence(call: Call) -> None:
    pytest.importorskip("submitit")
    app = (sys.executable, str(ROOT / "tests" / "helpers" / "sweep_app.py"), "-m", *ON_ONE_NODE)
    done = call(*app, "model.optimizer.lr=0.1,0.2")
    assert done.returncode == 1
    assert "set hydra.launcher.gpus_per_node=null to do without" in done.stderr
    assert "Traceback" not in done.stderr


# Shards


def test_shards_of_which_jobs_are_preempted_and_killed(call: Call, tmp_path: Path) -> None:
    """`engine=slurm`: a preempted job is requeued and goes on after its finished shards; those of a killed one are
    reported, and the same command does the rest. The bytes are those of one process.
    """
    pytest.importorskip("submitit")
    expected = shards_to_caption(tmp_path)
    engine = ("engine=slurm", "engine.cpus_per_task=1", "engine.shards_per_job=3")
    command = (sys.executable, "-m", "coca_lit.tools.caption", *RECAPTION, *engine)
    done = call(*command, KILLING=str(int(signal.SIGUSR2)))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists()
    assert "6 shards: 6 done, 0 skipped (finished before), 0 failed" in done.stderr
    assert contents(tmp_path / "new") == expected
    (tmp_path / "killed").unlink()
    killed, resumed = (call(*command, "output=again") for _ in range(2))
    assert killed.returncode == 1
    assert "killed by SIGKILL" in killed.stderr
    assert "Traceback" not in killed.stderr
    assert "error: 3 of 6 shards" in killed.stderr
    assert "6 shards: 2 done, 4 skipped (finished before), 0 failed" in resumed.stderr
    assert contents(tmp_path / "again") == expected
