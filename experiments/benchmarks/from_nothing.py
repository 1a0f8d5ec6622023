"""How long it takes from nothing to a trained demo: the commands of the README, in a fresh clone.

    python experiments/benchmarks/from_nothing.py

On a machine with nothing else to do, then beside a program that never rests. What the installation takes depends on
where pip finds the packages: `--index-url ""` leaves that to its configuration.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.benchmarks.busy import busy
from experiments.benchmarks.record import record

ROOT = Path(__file__).resolve().parents[2]
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
TARGETS = {(0, "install"): "below 40", (0, "demo"): "below 150", (1, "both"): "below 300"}  # seconds on two cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index-url", default=CPU_WHEELS, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--programs", type=int, nargs="+", default=[0, 1], help="that never rest (0 1)")
    options = parser.parse_args()
    for programs in options.programs:
        with busy(programs), tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), options.index_url)
        found["both"] = found["install"] + found["demo"]
        rows = [
            {"case": case, "other programs": programs, "seconds": round(seconds), "target": target}
            for case, seconds in found.items()
            for target in [TARGETS.get((programs, case), "")]
        ]
        record(Path(__file__).with_suffix(".csv"), rows)


def measure(folder: Path, index_url: str) -> dict[str, float]:
    """Seconds of both steps."""
    subprocess.run(["git", "clone", "-q", ROOT, folder / "coca_lit"], check=True)
    ours = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS")  # a user sets none of them
    environment = {name: value for name, value in os.environ.items() if name not in ours}

    def seconds(*commands: list[str]) -> float:
        start = time.monotonic()
        for command in commands:
            subprocess.run(command, cwd=folder / "coca_lit", env=environment, check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - start

    pip = [".venv/bin/python", "-m", "pip", "install", "-q", "--no-compile"]
    torch = [*pip, "torch", "torchvision", *(["--index-url", index_url] if index_url else [])]
    install = seconds([sys.executable, "-m", "venv", ".venv"], torch, [*pip, "-e", "."])
    return {"install": install, "demo": seconds([".venv/bin/coca-train"])}


if __name__ == "__main__":
    main()
