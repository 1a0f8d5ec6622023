"""Requeues one job of train.sbatch again and again, on a real SLURM of one node (experiments/clusters), and compares it
with an undisturbed job.

    experiments/clusters/alone.sh python experiments/slurm/requeues.py --times 10

requeues.csv has a row for each requeue. Needs root, as the daemons do: apt-get install slurm-wlm munge
"""

import argparse
import csv
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "experiments" / "clusters" / "slurm.sh"
SIZES = ("trainer.accelerator=cpu", "trainer.precision=32-true", "model.net.name=coca_tiny", "image_size=32")
SHORT = ("data.batch_size=8", "data.train_count=64", "trainer.limit_val_batches=1", "evals=[]", "threads=1")
LOGS = ("trainer.log_every_n_steps=1", "callbacks.checkpoint.every_n_steps=1000")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Cluster(NamedTuple):
    """A SLURM that runs.

    Attributes:
        config: its slurm.conf.
        folder: where commands are started.
    """

    config: Path
    folder: Path

    def call(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        own = {"SLURM_CONF": str(self.config), "PYTHONPATH": str(ROOT), "COLUMNS": "200", "SRUN_CPUS_PER_TASK": "1"}
        env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "PL_"))}
        return subprocess.run(
            command, cwd=self.folder, env=env | own | environment, capture_output=True, text=True, timeout=600
        )

    def submit(self, *words: str) -> "Submitted":
        """train.sbatch as it is, but for the paths of Python and of train.py."""
        text = (ROOT / "experiments" / "slurm" / "train.sbatch").read_text()
        assert "srun python train.py" in text
        script = self.folder / "train.sbatch"
        script.write_text(text.replace("srun python train.py", f"srun {sys.executable} {ROOT / 'train.py'}"))
        options = ("--parsable", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=30")
        done = self.call("sbatch", *options, str(script), *words)
        assert done.returncode == 0, done.stderr
        return Submitted(self, done.stdout.strip())


class Submitted(NamedTuple):
    """A job of train.sbatch with experiment=demo."""

    cluster: Cluster
    number: str

    @property
    def run(self) -> Path:
        return self.cluster.folder / "outputs" / "demo" / f"slurm_{self.number}"

    @property
    def state(self) -> str:
        return re.findall(r"JobState=(\w+)", self.shown())[0]

    def shown(self) -> str:
        return self.cluster.call("scontrol", "show", "job", self.number).stdout

    def log(self) -> str:
        path = self.cluster.folder / f"slurm_{self.number}.log"
        return path.read_text() if path.exists() else ""

    def starts(self) -> bool:
        """Python runs, PyTorch is not imported yet."""
        return "loading libraries" in self.log()

    def signal(self) -> None:
        """What SLURM does two minutes before the time of the job is over; returns when it is requeued."""
        before = self.log().count("requeued job")
        assert self.cluster.call("scancel", "--signal=USR1", self.number).returncode == 0
        until(lambda: self.log().count("requeued job") > before or self.state in OVER)

    def completes(self) -> bool:
        until(lambda: self.state in OVER, 600.0)
        return self.state == "COMPLETED"


@contextmanager
def cluster(folder: Path) -> Iterator[Path]:
    """The slurm.conf of a SLURM of one node that runs within the block; raises `RuntimeError` if it does not start."""
    env = os.environ | {"SLURM_TEST_PORT": str(free_port())}
    try:
        started = subprocess.run([SCRIPT, "start", folder], env=env, stderr=subprocess.PIPE, text=True, timeout=90)
        if started.returncode:
            raise RuntimeError(f"SLURM does not start: {' '.join(started.stderr.splitlines()[-3:])}")
        yield folder / "slurm.conf"
    finally:
        subprocess.run([SCRIPT, "stop", folder], check=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def curve(folder: Path) -> list[tuple[str, ...]]:
    """Step and losses, in full precision."""
    columns = ("step", "train/contrastive_loss", "train/caption_loss")
    if not (folder / "metrics.csv").exists():
        return []
    with (folder / "metrics.csv").open(newline="") as file:
        return [tuple(row[name] for name in columns) for row in csv.DictReader(file) if row.get(columns[1])]


def requeue(job: Submitted, times: int) -> list[dict[str, str]]:
    """A row per requeue: the first while Python starts, the others after a few more steps."""

    def trained(after: int) -> bool:
        return len(curve(job.run)) > after + 3 or job.state in OVER

    rows, seen, begun = [], 0, time.monotonic()
    for i in range(times):
        if i == 0:
            until(job.starts)
        else:
            until(partial(trained, seen))
        job.signal()
        assert job.state not in OVER, job.log()
        now, stops = time.monotonic(), re.findall(r"stopping after step (\d+)", job.log())
        said = {"saved after step": stops[-1] if i else "-", "seconds": f"{now - begun:.1f}"}
        rows.append({"requeue": str(i + 1), "signal": "while it trains" if i else "while it starts"} | said)
        seen, begun = len(curve(job.run)), now
    return rows


def differences(a: Path, b: Path) -> str:
    """What of two runs is not equal: the curves, or a bit of the weights; "" if nothing."""
    import torch

    if curve(a) != curve(b):
        return "curves"
    left, right = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (a, b))
    return "" if left.keys() == right.keys() and all(left[key].equal(right[key]) for key in left) else "weights"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10, help="requeues (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("requeues.csv"), help="the table")
    options = parser.parse_args()
    from coca_lit.runs.run_folder import environment

    about = {key: environment()[key] for key in ("commit", "machine", "torch")}
    about["command"] = f"experiments/clusters/alone.sh python experiments/slurm/requeues.py --times {options.times}"
    words = (*SIZES, *SHORT, *LOGS, f"trainer.max_epochs={4 * options.times}")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, cluster(Path(folder) / "slurm") as config:
        slurm = Cluster(config, Path(folder))
        job = slurm.submit(*words)
        rows = requeue(job, options.times)
        assert job.completes(), job.log()
        undisturbed = slurm.submit(*words)
        assert undisturbed.completes(), undisturbed.log()
        end = differences(job.run, undisturbed.run) or "same bits"
        log = job.log()
        found: dict[str, int | str] = {"logs": len([*Path(folder).glob(f"slurm_{job.number}*")])}
        found |= {"requeued": log.count("requeued job"), "resumed": log.count("resuming after step")}
        found |= {"steps": len(curve(job.run)), "end": end}
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *found, *about])
        writer.writeheader()
        writer.writerows(row | found | about for row in rows)
    print(found)
    sys.exit(end != "same bits")


if __name__ == "__main__":
    main()
