"""Kills a sweep at random moments, starts it by the same command, and compares every run of it bit for bit with an
undisturbed sweep.

    python experiments/faults/sweeps.py --faults 20

sweeps.csv has a row per fault and is written after every sweep.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from experiments.faults.soak import HANGS, TINY, difference, write_csv  # noqa: E402  found by the line above
from experiments.faults.victim import children  # noqa: E402

RUNS = 3
WORDS = (*TINY, "data.train_count=32", "data.num_workers=0", f"seed={','.join(map(str, range(RUNS)))}")
MOST_FAULTS = 6  # in one sweep, which then ends undisturbed


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "train.py"), "-m", *WORDS, f"hydra.sweep.dir={folder}"]
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder.parent, stdout=log, stderr=log, start_new_session=True)


def disturbed(folder: Path, rng: random.Random, seconds: float) -> list[dict[str, Any]]:
    """The faults of one sweep, the last start of which is left alone."""
    events: list[dict[str, Any]] = []
    for _ in range(rng.randint(2, MOST_FAULTS)):
        process, fault = start(folder), rng.choice(("kill -9", "kill -9 of one process", "SIGTERM"))
        at = rng.uniform(0, seconds)
        try:
            process.wait(at)
        except subprocess.TimeoutExpired:
            one = rng.choice(children(process.pid) or [process.pid])
            if fault == "kill -9":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                os.kill(one if "one" in fault else process.pid, signal.SIGKILL if "kill" in fault else signal.SIGTERM)
            code = process.wait(HANGS)
            done = len([*folder.glob("*/results.json")])
            events.append({"fault": fault, "at": round(at, 1), "exit": code, "finished runs": done})
    start(folder).wait(RUNS * HANGS)
    return events


def compared(whole: Path, sweep: Path) -> str:
    """What of two sweeps is not the same, "same bits" if nothing."""
    names = sorted(path.parent.name for path in whole.glob("*/results.json"))
    if len(names) != RUNS or names != sorted(path.parent.name for path in sweep.glob("*/results.json")):
        return "not all runs have results"
    found = {name: difference(whole / name, sweep / name) for name in names}
    return "; ".join(f"{name}: {what}" for name, what in found.items() if what) or "same bits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20, help="that are tried at least (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (%(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "sweeps.csv", help="the table (beside this file)")
    options = parser.parse_args()
    from coca_lit.runs.run_folder import environment

    about = {key: environment()[key] for key in ("commit", "machine", "torch")}
    about["command"] = f"python experiments/faults/sweeps.py --faults {options.faults} --seed {options.seed}"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sweeps-") as temporary:
        whole, began = Path(temporary, "whole"), time.monotonic()
        start(whole).wait()
        seconds = time.monotonic() - began
        for number in count():
            if len(rows) >= options.faults:
                break
            sweep = Path(temporary, f"sweep{number}")
            events = disturbed(sweep, random.Random(f"{options.seed}/{number}"), seconds)
            end = compared(whole, sweep)
            rows += [{"sweep": number, **event, "end": end, **about} for event in events]
            print(f"sweep {number}: {', '.join(event['fault'] for event in events)}: {end}", flush=True)
            write_csv(options.out, rows)
    sys.exit(any(row["end"] != "same bits" for row in rows))


if __name__ == "__main__":
    main()
