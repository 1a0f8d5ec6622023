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
    """`call(*command)` in an empty folder with SLURM's programs."""

    def call(*command: str) -> subprocess.CompletedProcess[str]:
        own = {"SLURM_CONF": slurm, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "SRUN_CPUS_PER_TASK": "1"}
        env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "PL_"))} | own
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)

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
