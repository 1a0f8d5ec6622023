"""Trains under faults drawn at random, again and again, and compares the end bit for bit with an undisturbed run.

    python experiments/faults/soak.py --kills 100

results.csv has a row per fault, events.csv one each time that a fault was tried. Both are written after every run.
The processes are forked from one that has imported everything: a cycle then takes seconds.
"""

import argparse
import contextlib
import csv
import os
import random
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])

import faults  # noqa: E402  found by the line above
import victim  # noqa: E402
from victim import Trouble  # noqa: E402

FORKSERVER = get_context("forkserver")
FORKSERVER.set_forkserver_preload(["preload"])
HANGS = 180  # seconds after which a process is taken for one that hangs
MOST_FAULTS = 12  # in one run, which then ends undisturbed
BROKEN = "broken samples and shards in the data all the time"
KILLED, SAVED = "ended by `kill -9`", "saved, exit code 143"  # columns of the table

# Two epochs of eight batches of the smallest network that has everything; a checkpoint at every fourth batch.
TINY = (
    *("trainer=cpu", "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "trainer.limit_val_batches=1"),
    *("trainer.val_check_interval=4", "data.batch_size=4", "model.warmup_steps=2", "evals=[]", "threads=1"),
    *("+model.net.text_layers=1", "+model.net.decoder_layers=1", "model.net.dropout=0.2"),
    *("+model.net.embed_dim=32", "+model.net.text_width=32", "+model.net.text_heads=2", "+model.net.pooler_heads=2"),
    "+model.net.image_encoder_args={channels: [8, 8, 16, 16], output_stride: 8}",
    *("callbacks.checkpoint.every_n_steps=4", "callbacks.checkpoint.keep_last=3", "callbacks.progress=null"),
)
MORE = ("ema=0.9", "trainer.accumulate_grad_batches=2", "callbacks.checkpoint.every_n_steps=2")


class Case(NamedTuple):
    """One kind of training."""

    data: str  # scenes; a stream of shards, with a manifest; the same indexed; a stream of broken shards
    workers: int
    ema: bool  # and accumulation of gradients over two batches

    @property
    def name(self) -> str:
        return f"{self.data}-workers{self.workers}{'-ema-accumulate' if self.ema else ''}"

    def overrides(self, folder: Path) -> tuple[str, ...]:
        shards = (f"data.shards={folder}/*.tar", "data.epoch_samples=32", "data.shuffle_buffer=4")
        allowed = f"data.max_bad_fraction={0.8 if self.data == 'broken' else 0.0}"
        indexed = f"data.indexed={str(self.data == 'indexed').lower()}"
        source = ("data.train_count=32",) if self.data == "scenes" else ("data=laion", *shards, allowed, indexed)
        return (*TINY, *source, f"data.num_workers={self.workers}", *(MORE if self.ema else ()))


CASES = [
    *(Case("scenes", 0, False), Case("shards", 2, True), Case("broken", 0, True), Case("scenes", 2, True)),
    *(Case("shards", 0, False), Case("broken", 2, False), Case("shards", 0, True), Case("scenes", 0, True)),
    *(Case("shards", 2, False), Case("indexed", 0, False), Case("scenes", 2, False), Case("indexed", 2, True)),
]


class Run:
    """A training that is started again and again.

    Attributes:
        rng: decides what happens when.
        seconds, training: about how long a run takes, and how long of that it trains.
        checkpoint_bytes: size of a checkpoint.
        kills: SIGKILLs that found their process alive.
    """

    def __init__(self, folder: Path, data: Path, overrides: tuple[str, ...], rng: random.Random) -> None:
        self.folder, self.data, self.overrides, self.rng = folder, data, overrides, rng
        self.seconds, self.training, self.checkpoint_bytes, self.kills = 1.0, 1.0, 0, 0
        self.log = folder.parent / f"{folder.name}.log"
        self._log_start = 0
        self._started = 0.0

    def start(self, trouble: Trouble | None = None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log.touch()
        self._log_start = self.log.stat().st_size
        self.trains = FORKSERVER.Event()
        arguments = (self.folder, self.overrides, self.data, trouble or Trouble(), self.trains)
        self.process = FORKSERVER.Process(target=victim.train, args=arguments)
        self.process.start()
        self._started = time.monotonic()

    def moment(self) -> float:
        """Seconds from the start, anywhere within a run."""
        return self.rng.uniform(0, self.seconds)

    def over(self, seconds: float = 0.0) -> bool:
        self.process.join(seconds)
        return self.process.exitcode is not None

    def over_in_training(self) -> bool:
        """Waits for a moment within training; whether the process was over before it."""
        return self.over_before(self.trains.is_set) or self.over(self.rng.uniform(0, self.training))

    def over_before(self, condition: Callable[[], bool]) -> bool:
        """Waits until something is so; whether the process was over before it."""
        until = time.monotonic() + HANGS
        while not condition() and time.monotonic() < until:
            if self.over(0.01):
                return not condition()
        return False

    def kill(self, with_workers: bool = True, allowed: tuple[int, ...] = ()) -> str | None:
        with contextlib.suppress(ProcessLookupError):  # over at this very moment
            (os.killpg if with_workers else os.kill)(self._leader(), signal.SIGKILL)
        return self.ends(-signal.SIGKILL, *allowed)

    def terminate(self, again: float | None = None) -> str | None:
        """Progress is saved, unless training is over; a second signal, `again` seconds later, does no harm."""
        os.kill(self.process.pid or 0, signal.SIGTERM)
        if again is not None and not self.over(again):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid or 0, signal.SIGTERM)
        problem = self.ends(143, -signal.SIGTERM)
        lost = "nothing was saved" in self.said() and "stopping after step 0 " not in self.said()
        return "nothing was saved" if problem == "" and lost else problem

    def ends(self, *codes: int) -> str | None:
        """Waits for the end of the process: "" if its exit code is one of these, None if it was just done."""
        if not self.over(HANGS):
            os.killpg(self._leader(), signal.SIGKILL)
            self.process.join()
            return "it hung"
        code = self.process.exitcode
        self.kills += code == -signal.SIGKILL
        if code in codes:
            return ""
        if code == 0:
            self.seconds = (self.seconds + time.monotonic() - self._started) / 2  # the machine may be busier or not
        return None if code == 0 else f"exit code {code}: {self.said().strip().splitlines()[-1:]}"

    def said(self) -> str:
        """Output of the process."""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoints/step_*.ckpt"), key=lambda path: int(path.stem[5:]))

    def _leader(self) -> int:
        pid = self.process.pid or 0
        while self.process.is_alive():  # it has become the leader of a group, as its first deed
            try:
                if os.getpgid(pid) == pid:
                    break
            except ProcessLookupError:
                break
            time.sleep(0.01)
        return pid


def difference(a: Path, b: Path) -> str:
    """What of two finished runs is not the same: all of the last checkpoint, logs, bad samples; "" if nothing."""
    import torch

    left, right = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (a, b))
    different = next(_differences(left, right), "")
    if different:
        return f"last.ckpt: {different}"
    if _rows(a / "metrics.csv") != _rows(b / "metrics.csv"):
        return "metrics.csv"
    if _lines(a / "bad_samples" / "rank0.csv") != _lines(b / "bad_samples" / "rank0.csv"):
        return "bad samples"
    return "" if (b / "results.json").exists() and (b / "report.html").exists() else "results or report missing"


def _differences(a: Any, b: Any, name: str = "") -> Iterator[str]:
    import torch

    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from _differences(a[key], b[key], f"{name}/{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(x, y, f"{name}/{i}")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or a.numpy().tobytes() != b.numpy().tobytes():
            yield name
    elif a != b:
        yield name


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "samples/s"} for row in csv.DictReader(file)]


def _lines(path: Path) -> set[str]:
    return set(path.read_text().splitlines()) if path.exists() else set()


def write_data(folder: Path, broken: bool) -> Path:
    """Four shards of six scenes; with a manifest, or with samples and shards that nobody can read."""
    from coca_lit.cli.data import data
    from coca_lit.data.scenes.export import write_shards

    folder.mkdir(parents=True)
    write_shards(folder, count=24, size=32, per_shard=6)
    if not broken:
        data(["check", str(folder), "--workers", "1"])
        return folder
    first, second, third, _ = sorted(folder.glob("*.tar"))
    _rewrite(first, lambda name, content: (name, bytes(9) if name.endswith("02.jpg") else content))
    second.write_bytes(second.read_bytes()[: second.stat().st_size // 2])
    _rewrite(third, lambda name, content: (name.replace("21.txt", "21.pkl"), content))
    return folder


def _rewrite(path: Path, change: Callable[[str, bytes], tuple[str, bytes]]) -> None:
    with tarfile.open(path) as tar:
        members = [change(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))


class Soak:
    """Runs of all cases in turn, until there were `kills` of them; one row of `events` per fault."""

    def __init__(self, work: Path, seed: int, cases: list[Case]) -> None:
        self.work, self.seed, self.cases = work, seed, cases
        self.data = {name: write_data(work / name, name == "broken") for name in ("shards", "indexed", "broken")}
        self.undisturbed: dict[Case, Run] = {}
        warm = FORKSERVER.Process(target=abs, args=(0,))  # the imports, which belong to no run
        warm.start()
        warm.join()
        self.started = time.time()

    def run(self, case: Case, number: int) -> list[dict[str, Any]]:
        """The events of one run under faults."""
        whole = self.undisturbed.get(case) or self._undisturbed(case)
        rng = random.Random(f"{self.seed}/{number}")
        run = Run(self.work / f"run{number}", whole.data, whole.overrides, rng)
        run.seconds, run.training, run.checkpoint_bytes = whole.seconds, whole.training, whole.checkpoint_bytes
        events: list[dict[str, Any]] = []
        menu = faults.EVERYWHERE | (faults.ON_SHARDS if case.data == "shards" else {})
        for _ in range(MOST_FAULTS):
            (name,) = rng.choices(list(menu), [faults.WEIGHTS.get(name, 1) for name in menu])
            kills = run.kills
            problem = menu[name](run)
            step = [path.stem[5:] for path in run.checkpoints()][-1:] or ["0"]
            event = {"run": number, "case": case.name, "fault": name, "kills": run.kills - kills}
            event |= {"exit": run.process.exitcode, "step": step[0], "seconds": round(time.time() - self.started)}
            if problem is None and event["kills"]:
                event["fault"] = "kill"  # it came before what was to be tried with it
            if problem is not None or event["kills"]:
                events.append(event | {"problem": problem or ""})
            if run.process.exitcode == 0:
                break
        whole.seconds = run.seconds
        run.start()  # undisturbed to the end; or a finished run once more, which must change nothing
        end = "" if run.ends() is None else f"the last start failed: {run.said().strip().splitlines()[-1:]}"
        end = end or difference(whole.folder, run.folder)
        if case.data == "broken":
            events.append({**events[-1], "fault": "broken_data", "kills": 0, "problem": ""} if events else {})
        return [event | {"end": end or "same bits"} for event in events if event]

    def _undisturbed(self, case: Case) -> Run:
        data = self.data.get(case.data, self.work / "none")
        run = Run(self.work / case.name, data, case.overrides(data), random.Random(0))
        started = time.monotonic()
        run.start()
        run.over_before(run.trains.is_set)
        began = time.monotonic()
        run.over_before(lambda: not run.trains.is_set())
        run.training = time.monotonic() - began
        if run.ends() is not None:
            raise RuntimeError(f"the undisturbed run of {case.name} failed:\n{run.said()}")
        run.seconds = time.monotonic() - started
        run.checkpoint_bytes = run.checkpoints()[-1].stat().st_size
        print(f"{case.name}: {run.seconds:.1f} s undisturbed", flush=True)
        self.undisturbed[case] = run
        return run

    def until(self, kills: int) -> Iterator[list[dict[str, Any]]]:
        """All events so far, after every run."""
        events: list[dict[str, Any]] = []
        for number in count():
            if sum(event["kills"] for event in events) >= kills:
                return
            case = self.cases[number % len(self.cases)]
            new = self.run(case, number)
            events += new
            done = ", ".join(" ".join(filter(None, (event["fault"], event["problem"]))) for event in new)
            total, end = sum(event["kills"] for event in events), new[-1]["end"] if new else "-"
            print(f"run {number}, {case.name}: {done}: {end}; {total} kills", flush=True)
            yield events


def summary(events: list[dict[str, str]]) -> list[dict[str, str]]:
    """A row per fault, and one for all of them: tried, survived, lost, kills, signals that were answered by a save."""
    titles = {name: " ".join((fault.__doc__ or "").split()) for name, fault in menu().items()}
    tried, lost, kills, saves = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for event in events:
        bad = bool(event["problem"]) or event["end"] != "same bits"
        tried[event["fault"]] += 1
        lost[event["fault"]] += bad
        kills[event["fault"]] += int(event["kills"])
        saves[event["fault"]] += str(event["exit"]) == "143" and event["fault"] != "broken_data"
    rows = [
        {"run": name, "fault": title, "tried": tried[name], "survived": tried[name] - lost[name], "lost": lost[name]}
        | {KILLED: kills[name], SAVED: saves[name]}
        for name, title in (titles | {"broken_data": BROKEN}).items()
        if tried[name]
    ]
    total = {key: sum(row[key] for row in rows) for key in ("tried", "survived", "lost", KILLED, SAVED)}
    return [{key: str(value) for key, value in row.items()} for row in [*rows, {"run": "all", "fault": "all", **total}]]


def menu() -> dict[str, faults.Fault]:
    return faults.EVERYWHERE | faults.ON_SHARDS


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    if rows:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def about(kills: int, seed: int) -> dict[str, str]:
    """The columns that every study has, but for the seconds."""
    from coca_lit.runs.run_folder import environment

    found = environment()
    command = f"python experiments/faults/soak.py --kills {kills} --seed {seed}"
    return {"seed": str(seed), **{key: found[key] for key in ("commit", "machine", "torch")}, "command": command}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs to do (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (%(default)s)")
    parser.add_argument("--out", type=Path, default=HERE, help="where the CSVs go (beside this file)")
    parser.add_argument("--keep", type=Path, help="new folder for the runs (default: a temporary one)")
    options = parser.parse_args()
    provenance, rows = about(options.kills, options.seed), []
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        soak = Soak((options.keep or Path(temporary)).resolve(), options.seed, CASES)
        for events in soak.until(options.kills):
            seconds = {"seconds": str(round(time.time() - soak.started))}
            rows = [row | provenance | seconds for row in summary(events)]
            write_csv(options.out / "events.csv", events)  # also what was done before somebody stops it
            write_csv(options.out / "results.csv", rows)
    sys.exit(not rows or rows[-1]["lost"] != "0")


if __name__ == "__main__":
    main()
