"""Trains from an S3 server that fails at random, with kill and resume; the end must be that of an undisturbed run.

    python experiments/faults/stores.py --faults 30

stores.csv has a row for each fault that a training met. Outages last as long as they do outside: it takes a quarter of
an hour, most of it waiting.
"""

import argparse
import logging
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "tests")]

from experiments.faults import soak  # noqa: E402
from experiments.faults.soak import TINY, Run, difference, write_csv  # noqa: E402
from helpers.faulty_store import FaultyStore  # noqa: E402  found by the lines above

soak.HANGS = 900  # seconds: a run waits for several outages
SHARDS, SAMPLES = 32, 2  # of each
SIZE = 10240  # bytes of a shard
CACHE = 18 * SIZE  # the least for windows of two shards and two workers; the others are fetched again in every pass
LATEST = 100  # the request at which a fault may come; an undisturbed run has 150
BUCKET = "bucket"


class Fault(NamedTuple):
    kind: str
    amount: float  # seconds of an outage, or how many requests in a row
    at: int  # the request of this start that is the first to fail


def drawn(rng: random.Random) -> Fault:
    kind = rng.choice(("outage", "outage", "slow down", "reset", "cut", "slow"))
    amount = round(rng.uniform(1, 60), 1) if kind == "outage" else rng.randint(1, 12)
    return Fault(kind, amount, rng.randint(1, LATEST))


class Store(FaultyStore):
    """Fails once after `plan`, and tells by `hit` that it did."""

    def __init__(self) -> None:
        super().__init__()
        self.hit = threading.Event()
        self._planned: Fault | None = None
        self._seen = 0
        self._lock = threading.Lock()

    def plan(self, fault: Fault | None) -> None:
        with self._lock:
            self.faults.clear()
            self.hit.clear()
            self._planned, self._seen = fault, 0

    def draw(self) -> str:
        with self._lock:
            self._seen += 1
            fault = self._planned
            if fault is not None and self._seen >= fault.at:
                self._planned = None
                self.hit.set()
                if fault.kind == "outage":
                    self.stop()
                    threading.Timer(fault.amount, self.start).start()
                    return "reset"
                self.faults.extend([fault.kind] * int(fault.amount))
            return super().draw()


def overrides(workers: int, cache: Path) -> tuple[str, ...]:
    return (
        *(*TINY, "data=laion", f"data.shards=s3://{BUCKET}/set/*.tar", "data.epoch_samples=64"),
        *("data.readers=2", f"data.window_gb={2 * SIZE / 1e9}", f"data.num_workers={workers}"),
        *("data.max_bad_fraction=0", f"data.cache_dir={cache}", f"data.cache_gb={CACHE / 1e9}"),
    )


def upload(store: FaultyStore, folder: Path) -> None:
    from coca_lit.tools.prepare.command import data
    from coca_lit.tools.prepare.scenes import write_shards

    folder.mkdir()
    write_shards(folder, count=SHARDS * SAMPLES, size=32, per_shard=SAMPLES)
    data(["check", str(folder), "--workers", "1"])
    store.put(BUCKET, {f"set/{path.name}": path.read_bytes() for path in folder.iterdir() if path.suffix != ".index"})


def undisturbed(store: Store, work: Path, workers: int) -> Run:
    store.plan(None)
    name = f"whole{workers}"
    whole = Run(work / name, work, overrides(workers, work / "cache"), random.Random(0))
    before = store.requests
    shutil.rmtree(work / "cache", ignore_errors=True)
    whole.start()
    if whole.ends() is not None:
        raise RuntimeError(f"the undisturbed run with {workers} workers failed:\n{whole.said()}")
    print(f"{workers} workers: {store.requests - before} requests undisturbed", flush=True)
    return whole


def disturbed(store: Store, work: Path, workers: int, number: int, seed: int) -> tuple[Run, list[dict[str, Any]]]:
    """A run that is started until it is done, with a fault in each start; and a row for each that it met."""
    rng = random.Random(f"{seed}/{number}")
    cache = work / "cache"
    run = Run(work / f"run{number}", work, overrides(workers, cache), rng)
    events: list[dict[str, Any]] = []
    for start in count():
        if not start or rng.random() < 0.3:  # on another machine
            shutil.rmtree(cache, ignore_errors=True)
        fault, after = drawn(rng), rng.choice(("nothing", "kill -9", "kill -9", "SIGTERM"))
        pause = rng.uniform(0, min(fault.amount, 20.0) + 2)
        store.plan(fault)
        began = time.monotonic()
        run.start()
        problem, done = "", run.over_before(store.hit.is_set)
        if done or after == "nothing" or run.over(pause):
            problem = run.ends() or ""
        elif after == "kill -9":
            problem = run.kill() or ""
        else:
            problem = run.terminate() or ""
        while store.is_away:  # before the next fault
            time.sleep(0.1)
        if store.hit.is_set():
            step = [path.stem[5:] for path in run.checkpoints()][-1:] or ["0"]
            event = {
                "run": number,
                "workers": workers,
                "fault": fault.kind,
                "amount": fault.amount,
                "request": fault.at,
            }
            event |= {"then": after, "exit": run.process.exitcode, "step": step[0]}
            events.append(event | {"seconds": round(time.monotonic() - began, 1), "problem": problem})
        if run.process.exitcode == 0 or problem:
            return run, events
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30, help="to meet (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (%(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "stores.csv", help="the table (beside this file)")
    parser.add_argument("--keep", type=Path, help="new folder for the runs (default: a temporary one)")
    options = parser.parse_args()
    from coca_lit.runs.run_folder import environment

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # moto's, which logs requests
    about = {key: environment()[key] for key in ("commit", "machine", "torch")}
    about["command"] = f"python experiments/faults/stores.py --faults {options.faults} --seed {options.seed}"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="stores-") as temporary:
        work = (options.keep or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        store = Store()
        os.environ |= {"AWS_ENDPOINT_URL_S3": store.url, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
        os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
        upload(store, work / "set")
        wholes: dict[int, Run] = {}
        for number in count():
            if len(rows) >= options.faults:
                break
            workers = (0, 2)[number % 2]
            if workers not in wholes:
                wholes[workers] = undisturbed(store, work, workers)
            whole = wholes[workers]
            run, events = disturbed(store, work, workers, number, options.seed)
            end = run.said().strip().splitlines()[-1:] if run.process.exitcode else difference(whole.folder, run.folder)
            rows += [{**event, "end": end or "same bits", **about} for event in events]
            told = ", ".join(f"{event['fault']} {event['amount']} then {event['then']}" for event in events)
            print(
                f"run {number}, {workers} workers: {told or '-'}: {end or 'same bits'}; {len(rows)} faults", flush=True
            )
            write_csv(options.out, rows)
        store.close()
    sys.exit(any(row["problem"] or row["end"] != "same bits" for row in rows))


if __name__ == "__main__":
    main()
