"""How long one waits for an answer: fresh processes, ours and OpenCLIP's, wall and CPU seconds.

    python experiments/benchmarks/startup.py

The commands take turns. The first step of the demo is seen in its metrics.csv; the process is killed then.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.benchmarks.record import record

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "train.py")
POLL = 0.01  # seconds
ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT  # for waitid: has it ended, and leave it to wait4


class Case(NamedTuple):
    arguments: Sequence[str]  # of python
    target: str = ""  # wall seconds on two cores that do nothing else
    answered: Callable[[Path], bool] | None = None  # looks into the folder where it runs; None: when the process ends
    code: int = 0  # with which it then ends


class Seconds(NamedTuple):
    wall: float
    cpu: float


def has_trained(folder: Path) -> bool:
    metrics = folder / "run" / "metrics.csv"
    return metrics.exists() and len(metrics.read_text().splitlines()) > 1


CASES = {
    "python train.py --help": Case((TRAIN, "--help"), "below 2"),
    "a misspelt key": Case((TRAIN, "model.optimizer.lrr=1"), "below 2", code=1),
    "coca-evaluate --help": Case(("-m", "coca_lit.cli.evaluate", "--help"), "below 2"),
    "python train.py, to the first optimizer step": Case(
        (TRAIN, "trainer=cpu", "trainer.log_every_n_steps=1", "output_dir=run"), "below 8", has_trained
    ),
    "import torch": Case(("-c", "import torch")),
    "import lightning.pytorch": Case(("-c", "import lightning.pytorch")),
    "OpenCLIP: import open_clip": Case(("-c", "import open_clip")),
    "OpenCLIP: python -m open_clip_train.main --help": Case(("-m", "open_clip_train.main", "--help")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Start-up time of the commands.")
    parser.add_argument("--repetitions", type=int, default=5)
    repetitions = parser.parse_args().repetitions
    seconds: dict[str, list[Seconds]] = {name: [] for name in CASES}
    for turn in range(repetitions + 1):
        for name, case in CASES.items():
            measured = measure(case)
            if turn:  # the first turn reads the files into memory
                seconds[name].append(measured)
    record(Path(__file__).with_suffix(".csv"), [row(name, found) for name, found in seconds.items()])


def measure(case: Case) -> Seconds:
    """Of the command in a new folder, to its end or until it has answered."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *case.arguments], cwd=folder, env=environment, stdout=said, stderr=said
        )
        if case.answered is not None:
            while not case.answered(Path(folder)) and not os.waitid(os.P_PID, process.pid, ENDED):
                time.sleep(POLL)
            os.kill(process.pid, signal.SIGKILL)
        _, status, used = os.wait4(process.pid, 0)  # as `process.wait` does, but with the seconds
        wall = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != (case.code if case.answered is None else -signal.SIGKILL):
            said.seek(0)
            sys.exit(f"{' '.join(case.arguments)} ended with {process.returncode}:\n{said.read().decode()}")
        return Seconds(wall, used.ru_utime + used.ru_stime)


def row(name: str, found: Sequence[Seconds]) -> dict[str, object]:
    wall, cpu = ([f"{value:.2f}" for value in summary(values)] for values in zip(*found, strict=True))
    return {
        "case": name,
        "repetitions": len(found),
        **{f"{kind} s": f"{m} ({low}-{high})" for kind, (m, low, high) in (("wall", wall), ("CPU", cpu))},
        "target": CASES[name].target,
    }


def summary(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


if __name__ == "__main__":
    main()
