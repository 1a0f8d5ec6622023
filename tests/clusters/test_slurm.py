"""Training under a real SLURM of one node, see experiments/clusters: starts, refusals, signals, requeueing."""

import csv
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running import ROOT

pytestmark = pytest.mark.slow  # .ci/clusters runs them

SCRIPT = ROOT / "experiments" / "clusters" / "slurm.sh"
SIZES = ("trainer.accelerator=cpu", "trainer.precision=32-true", "model.net.name=coca_tiny", "image_size=32")
SHORT = ("data.batch_size=8", "data.train_count=64", "trainer.limit_val_batches=1", "evals=[]", "threads=1")
LOGS = ("trainer.log_every_n_steps=1", "callbacks.checkpoint.every_n_steps=1000")

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The path of `slurm.conf` of a cluster that runs while the tests of this module do."""
    if shutil.which("slurmctld") is None or os.geteuid() != 0:
        pytest.skip("needs root and SLURM: apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([SCRIPT, "start", folder], check=True, timeout=90)
    yield str(folder / "slurm.conf")
    subprocess.run([SCRIPT, "stop", folder], check=True)


@pytest.fixture
def call(slurm: str, tmp_path: Path) -> Call:
    """`call(*command, **environment)` in an empty folder with SLURM's programs."""

    def call(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        own = {"SLURM_CONF": slurm, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "SRUN_CPUS_PER_TASK": "1"}
        env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "PL_"))}
        return subprocess.run(
            command, cwd=tmp_path, env=env | own | environment, capture_output=True, text=True, timeout=240
        )

    return call


def until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def submit(call: Call, folder: Path, *words: str) -> tuple[str, Path]:
    """The number of the job and its log, of the script in experiments/slurm."""
    text = (ROOT / "experiments" / "slurm" / "train.sbatch").read_text()
    assert "srun python train.py" in text
    script = folder / "train.sbatch"
    script.write_text(text.replace("srun python train.py", f"srun {sys.executable} {ROOT / 'train.py'}"))
    options = ("--parsable", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
    done = call("sbatch", *options, str(script), *words)
    assert done.returncode == 0, done.stderr
    number = done.stdout.strip()
    return number, folder / f"slurm_{number}.log"


def state(call: Call, number: str) -> str:
    fields = call("scontrol", "show", "job", number).stdout.split()
    return next(field.partition("=")[2] for field in fields if field.startswith("JobState="))


def curve(folder: Path) -> list[tuple[str, ...]]:
    """Step and losses, in full precision."""
    columns = ("step", "train/contrastive_loss", "train/caption_loss")
    with (folder / "metrics.csv").open(newline="") as file:
        return [tuple(row[name] for name in columns) for row in csv.DictReader(file) if row.get(columns[1])]


def test_more_tasks_than_devices_are_refused(call: Call) -> None:
    done = call("srun", "--ntasks-per-node=2", sys.executable, str(ROOT / "train.py"), "trainer=smoke", *SIZES)
    assert done.returncode != 0
    assert "2 processes were started, but this configuration trains with 1 (trainer.devices=1)" in done.stderr
    assert "Traceback" not in done.stderr


def test_tasks_without_a_number_per_node(call: Call, tmp_path: Path) -> None:
    steps = ("trainer.max_steps=2", "name=run")
    done = call("srun", "--ntasks=2", sys.executable, str(ROOT / "train.py"), *SIZES, *SHORT, *LOGS, *steps)
    assert done.returncode == 0, done.stderr
    assert [step for step, *_ in curve(tmp_path / "outputs" / "run")] == ["0", "1"]


def test_a_job_is_requeued_while_it_starts_and_while_it_trains(call: Call, tmp_path: Path) -> None:
    """One log, one folder, one curve, equal to that of an undisturbed job."""
    steps = ("trainer.max_epochs=6",)
    number, log = submit(call, tmp_path, *SIZES, *SHORT, *LOGS, *steps)
    until(lambda: state(call, number) == "RUNNING")
    assert f"JobName=demo/{number} " in call("scontrol", "show", "job", number).stdout.replace("\n", " ")
    until(lambda: "Job step" in call("scontrol", "show", "step", number).stdout or log.exists())
    time.sleep(1.0)  # Python runs, PyTorch is not imported yet
    assert call("scancel", "--signal=USR1", number).returncode == 0
    until(lambda: "requeued job" in log.read_text())
    run = tmp_path / "outputs" / "demo" / f"slurm_{number}"
    until(lambda: (run / "metrics.csv").exists() and len(curve(run)) > 3)
    assert call("scancel", "--signal=USR1", number).returncode == 0
    until(lambda: log.read_text().count("requeued job") == 2)
    until(lambda: state(call, number) not in ("RUNNING", "PENDING", "REQUEUED", "COMPLETING"))
    assert state(call, number) == "COMPLETED", log.read_text()
    assert "resuming after step" in log.read_text()

    undisturbed, its_log = submit(call, tmp_path, *SIZES, *SHORT, *LOGS, *steps)
    until(lambda: state(call, undisturbed) not in ("RUNNING", "PENDING", "COMPLETING"))
    assert state(call, undisturbed) == "COMPLETED", its_log.read_text()
    assert curve(run) == curve(tmp_path / "outputs" / "demo" / f"slurm_{undisturbed}")
    assert len(curve(run)) == 48


# Sweeps

ON_ONE_NODE = ("hydra/launcher=slurm_jobs", "hydra.launcher.cpus_per_task=1", "hydra.sweep.dir=sweep")
NO_GPUS = "hydra.launcher.gpus_per_node=null"


def rows_of(sweep: Path, key: str) -> dict[str, dict[str, str]]:
    with (sweep / "results.csv").open(newline="") as file:
        return {row[key]: row for row in csv.DictReader(file)}


def test_jobs_of_a_sweep_of_which_one_is_killed(call: Call, tmp_path: Path) -> None:
    """Two tasks each in one folder; all results are awaited and shown, the dead job with its reason."""
    pytest.importorskip("submitit")
    app = (sys.executable, str(ROOT / "tests" / "sweep_app.py"), "-m", *ON_ONE_NODE)
    rates = "model.optimizer.lr=0.1,109,2,0.3"
    done = call(*app, NO_GPUS, "hydra.launcher.tasks_per_node=2", "hydra.launcher.partition=all", rates)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    rows = rows_of(tmp_path / "sweep", "model.optimizer.lr")
    assert [rows[rate]["status"] for rate in ("0.1", "109", "2", "0.3")] == ["ok", "failed", "failed", "ok"]
    assert "state FAILED, killed by SIGKILL" in rows["109"]["error"]
    assert rows["2"]["error"] == "no model survives 2.0"
    assert len([*(tmp_path / "sweep" / "model.optimizer.lr=0.3").glob("rank[01].txt")]) == 2


def test_preempted_jobs_are_requeued_and_terminated_ones_stop(call: Call, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    app = (sys.executable, str(ROOT / "tests" / "preempted_app.py"), "-m", *ON_ONE_NODE, NO_GPUS, "seed=0,1")
    steps = ("trainer.max_epochs=1", "data.train_count=16", "data.batch_size=4")
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "tests", "tests/runs"))
    done = call(*app, "trainer=cpu", *SIZES, *SHORT, *LOGS, *steps, PYTHONPATH=paths)
    assert done.returncode == 1
    assert "error: 1 of 2 jobs did not end: the same command resumes them" in done.stderr
    rows = rows_of(tmp_path / "sweep", "seed")
    assert [rows[seed]["status"] for seed in "01"] == ["ok", "stopped"]
    said = [path.read_text() for path in sorted(tmp_path.glob("sweep/.submitit/*/*.out"))]
    assert "stopping after step 2 on signal 12: saved" in said[0]
    assert "resuming after step 2 in epoch 0, 8 samples seen" in said[0]
    assert "stopping after step 2 on signal 15: saved" in said[1]
    assert [[step for step, *_ in curve(tmp_path / "sweep" / f"seed={seed}")] for seed in "01"] == [
        ["0", "1", "2", "3"],
        ["0", "1"],
    ]


def test_gpus_that_no_node_has_are_one_sentence(call: Call) -> None:
    pytest.importorskip("submitit")
    app = (sys.executable, str(ROOT / "tests" / "sweep_app.py"), "-m", *ON_ONE_NODE)
    done = call(*app, "model.optimizer.lr=0.1,0.2")
    assert done.returncode == 1
    assert "set hydra.launcher.gpus_per_node=null to train without" in done.stderr
    assert "Traceback" not in done.stderr
