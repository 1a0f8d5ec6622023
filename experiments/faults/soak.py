"""Trains under faults drawn at random, again and again, and compares the end bit for bit with an undisturbed run.

    python experiments/faults/soak.py --faults 200

results.csv has a row per fault and per part of a configuration, events.csv one each time that a fault was tried. Both
are written after every run.
The processes are forked from one that has imported everything: a cycle then takes seconds.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO, StringIO
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = str(HERE.parents[1])
sys.path.insert(0, ROOT)
os.environ["PYTHONPATH"] = ROOT  # of the fork server

from experiments.faults import faults, victim  # noqa: E402  found by the lines above
from experiments.faults.victim import Trouble  # noqa: E402

FORKSERVER = get_context("forkserver")
FORKSERVER.set_forkserver_preload(["experiments.faults.preload"])
HANGS = 600  # seconds after which a process is taken for one that hangs, also on a busy machine
MOST_FAULTS = 12  # in one run, which then ends undisturbed
DISK = 96  # MB of the disk of a run; 64 stay free beside a checkpoint
BROKEN = "broken samples and shards in the data all the time"
KILLED, SAVED = "ended by `kill -9`", "saved, exit code 143"  # columns of the table
TIMES = ("samples/s", "train/data_wait", "train/scoring_share")  # in metrics.csv, never the same

# Two epochs of eight batches of the smallest network that has everything; a checkpoint at every fourth batch.
TINY = (
    *("trainer=cpu", "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "trainer.limit_val_batches=1"),
    *("trainer.val_check_interval=4", "data.batch_size=4", "model.warmup_steps=2", "evals=[]"),
    *("+model.net.text_layers=1", "+model.net.decoder_layers=1", "model.net.dropout=0.2"),
    *("+model.net.embed_dim=32", "+model.net.text_width=32", "+model.net.text_heads=2", "+model.net.pooler_heads=2"),
    "+model.net.image_encoder_args={channels: [8, 8, 16, 16], output_stride: 8}",
    *("callbacks.checkpoint.every_n_steps=4", "callbacks.checkpoint.keep_last=3", "callbacks.progress=null"),
)
# How often each kind of data is drawn. All shards but the broken ones have manifests and may lose nothing.
DATA = {"scenes": 4, "indexed shards": 4, "indexed mixture": 4, "indexed broken shards": 2}
SETS = ("a", "b")  # folders of shards, of the sources of a mixture
# Parts of a configuration; {work} is a folder for all runs, {run} the name of this one.
PARTS: dict[str, tuple[str, ...]] = {
    "texts": ("data.text={work}/texts.txt", "data.text_every=3"),
    "rewards": (
        "model.objectives.a={{_target_: coca_lit.projects.rewards.self_critical.SelfCritical, "
        "samples: 2, max_length: 6}}",
        "model.net.dropout=0",
    ),
    "LoRA": ("lora.rank=2", "lora.parts=[text]"),
    "micro-batches": ("trainer.micro_batch_size=2", "model.freeze=[image_encoder]"),
    "cached features": (
        *("model.freeze=[image_encoder]", "data.cached_augmentations=2"),
        "data.cache_dir={work}/{run}-views",
    ),
    "averaged weights": ("ema=0.9",),
    "accumulation": (
        *("trainer.accumulate_grad_batches=2", "callbacks.checkpoint.every_n_steps=2"),
        "model.caption_weight=0",  # losses over tokens are not accumulated
    ),
    "early stopping": (  # at the end of the second epoch, if the loss falls
        "trainer.max_epochs=3",
        "+callbacks.stop={{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: train/contrastive_loss, "
        "mode: max, patience: 1, check_on_train_epoch_end: true}}",
    ),
    "scores": (
        *("evals=[scenes_retrieval]", "scoring.images=4", "scoring.quick=3", "scoring.every_n_steps=4"),
        "callbacks.checkpoint.best=scenes/t2i_median_rank",
    ),
}
ONLY_SCENES = ("rewards", "cached features")  # these need the captions, or the images, of all samples
NOT_BOTH = (("rewards", "micro-batches"), ("rewards", "accumulation"), ("texts", "accumulation"))
PARTS_DRAWN = 3  # in the mean


class Case(NamedTuple):
    """One kind of training."""

    data: str
    workers: int
    ranks: int
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        return ", ".join((self.data, f"{self.workers} workers", f"{self.ranks} ranks", *self.parts))

    def overrides(self, work: Path, run: str) -> tuple[str, ...]:
        words = [*TINY, f"data.num_workers={self.workers}"]
        words += [victim.RANKS, "trainer.strategy=ddp"] if self.ranks == 2 else []
        folder = folder_of(self.data, work)
        if self.data == "scenes":
            words += ["data.train_count=32"]
        else:
            words += ["data=laion", "data.epoch_samples=32"]
            words += [f"data.max_bad_fraction={0.8 if 'broken' in self.data else 0.0}"]
            a, b = (f"'{folder}/{name}/*.tar'" for name in SETS)
            if "mixture" in self.data:
                words += [f"data.shards={{a: {a}, b: {b}}}", "data.weights={a: 0.7, b: 0.3}"]
            else:
                words += [f"data.shards=[{a},{b}]"]
        return (*words, *(word.format(work=work, run=run) for part in self.parts for word in PARTS[part]))


def drawn(rng: random.Random) -> Case:
    """A configuration; the parts that do not fit to those before are left out."""
    (data,) = rng.choices(list(DATA), list(DATA.values()))
    parts: list[str] = []
    for part in rng.sample(list(PARTS), len(PARTS)):
        fits = data == "scenes" or part not in ONLY_SCENES
        fits &= not any(part in pair and other in pair for pair in NOT_BOTH for other in parts)
        if fits and rng.random() < PARTS_DRAWN / len(PARTS):
            parts.append(part)
    return Case(data, rng.choice((0, 2)), rng.choice((1, 1, 2)), tuple(sorted(parts)))


def folder_of(data: str, work: Path) -> Path:
    """Where the shards of a kind of data are: each kind has its own, as faults change them."""
    return work / data.replace(" ", "-")


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
        self.has_disk = False  # of its own, which can be full
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

    def undisturbed(self) -> None:
        """Trains to the end, and notes how long that takes."""
        started = time.monotonic()
        self.start()
        self.over_before(self.trains.is_set)
        began = time.monotonic()
        self.over_before(lambda: not self.trains.is_set())
        self.training = time.monotonic() - began
        if self.ends() is not None:
            raise RuntimeError(f"the undisturbed run of {' '.join(self.overrides)} failed:\n{self.said()}")
        self.seconds = time.monotonic() - started
        self.checkpoint_bytes = self.checkpoints()[-1].stat().st_size

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
        leader, parts = self._leader(), victim.RANKS in self.overrides
        with contextlib.suppress(ProcessLookupError):  # over at this very moment
            if with_workers:
                os.killpg(leader, signal.SIGKILL)
            else:
                os.kill(self.rng.choice((parts and victim.children(leader)) or [leader]), signal.SIGKILL)
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
    """What of two finished runs is not the same, "" if nothing: all of the last checkpoint, logs, scores."""
    import torch

    left, right = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (a, b))
    different = next(_differences(left, right), "")
    if different:
        return f"last.ckpt: {different}"
    if _rows(a / "metrics.csv") != _rows(b / "metrics.csv"):
        return "metrics.csv"
    for name in ("bad_samples/rank0.csv", "bad_steps.jsonl"):
        if _lines(a / name) != _lines(b / name):
            return name
    if not ((b / "results.json").exists() and (b / "report.html").exists()):
        return "results.json or report.html is missing"
    return (
        "" if json.loads((a / "results.json").read_text()) == json.loads((b / "results.json").read_text()) else "scores"
    )


def _differences(a: Any, b: Any, name: str = "") -> Iterator[str]:
    import torch

    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in [key for key in a if key != "cache_dir"]:  # each run has its own
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
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def _lines(path: Path) -> set[str]:
    return set(path.read_text().splitlines()) if path.exists() else set()


def write_data(folder: Path, broken: bool) -> None:
    """Two folders of four shards of four scenes; with manifests, or with samples and shards that nobody can read."""
    from coca_lit.tools.prepare.command import data
    from coca_lit.tools.prepare.scenes import write_shards

    for name in SETS:
        (folder / name).mkdir(parents=True)
        write_shards(folder / name, count=16, size=32, per_shard=4)
        if not broken:
            with contextlib.redirect_stdout(StringIO()):
                data(["check", str(folder / name), "--workers", "1"])
    if broken:
        first, second, third, _ = sorted((folder / SETS[0]).glob("*.tar"))
        _rewrite(first, lambda name, content: (name, bytes(9) if name.endswith("02.jpg") else content))
        second.write_bytes(second.read_bytes()[: second.stat().st_size // 2])
        _rewrite(third, lambda name, content: (name.replace("11.txt", "11.pkl"), content))


def _rewrite(path: Path, change: Callable[[str, bytes], tuple[str, bytes]]) -> None:
    with tarfile.open(path) as tar:
        files = [(member.name, tar.extractfile(member)) for member in tar]
        members = [change(name, file.read()) for name, file in files if file is not None]
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))


class Soak:
    """Runs of random configurations under random faults, until this many faults were tried."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed = work, seed
        for name in DATA:
            if name != "scenes":
                write_data(folder_of(name, work), "broken" in name)
        (work / "texts.txt").write_text("".join(f"a small {word} thing\n" for word in ("red", "blue", "green", "pink")))
        warm = FORKSERVER.Process(target=abs, args=(0,))  # the imports, which belong to no run
        warm.start()
        warm.join()
        self.started = time.time()

    def run(self, number: int) -> list[dict[str, Any]]:
        """The events of one run under faults."""
        rng = random.Random(f"{self.seed}/{number}")
        case = drawn(rng)
        whole, run = (
            Run(self.work / name, folder_of(case.data, self.work), case.overrides(self.work, name), rng)
            for name in (f"whole{number}", f"run{number}")
        )
        whole.undisturbed()
        print(f"{case.name}: {whole.seconds:.1f} s undisturbed", flush=True)
        run.seconds, run.training, run.checkpoint_bytes = whole.seconds, whole.training, whole.checkpoint_bytes
        with disk(run.folder) as run.has_disk:
            events = list(self._events(case, run))
            run.start()  # undisturbed to the end; or a finished run once more, which must change nothing
            end = "" if run.ends() is None else f"the last start failed: {run.said().strip().splitlines()[-1:]}"
            end = end or difference(whole.folder, run.folder)
        return [{"run": number, "case": case.name, **event, "end": end or "same bits"} for event in events]

    def _events(self, case: Case, run: Run) -> Iterator[dict[str, Any]]:
        event: dict[str, Any] = {}
        for _ in range(MOST_FAULTS):
            fault = faults.drawn(run, on_shards=case.data != "scenes" and "broken" not in case.data)
            kills = run.kills
            problem = fault(run)
            step = [path.stem[5:] for path in run.checkpoints()][-1:] or ["0"]
            event = {"fault": fault.__name__, "kills": run.kills - kills, "exit": run.process.exitcode, "step": step[0]}
            event |= {"seconds": round(time.time() - self.started), "problem": problem or ""}
            if problem is None and event["kills"]:
                event["fault"] = "kill"  # it came before what was to be tried with it
            if problem is not None or event["kills"]:
                yield event
            if run.process.exitcode == 0:
                break
        if "broken" in case.data and event:
            yield event | {"fault": "broken_data", "kills": 0, "problem": ""}

    def until(self, tried: int) -> Iterator[list[dict[str, Any]]]:
        """All events so far, after every run."""
        events: list[dict[str, Any]] = []
        for number in count():
            if len(events) >= tried:
                return
            try:
                new = self.run(number)
            except RuntimeError as refused:
                print(refused, flush=True)
                continue
            events += new
            done = ", ".join(" ".join(filter(None, (event["fault"], event["problem"]))) for event in new)
            print(f"run {number}: {done}: {new[-1]['end'] if new else '-'}; {len(events)} faults", flush=True)
            yield events


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[bool]:
    """A small disk in a folder, if this process may mount one; whether it may."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def summary(events: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows with what was tried, survived, lost, killed, and answered by a save: of each fault, of all of them, and of
    those that came to a configuration with some part.
    """
    titles = {name: " ".join((fault.__doc__ or "").split()) for name, fault in faults.MENU.items()}
    groups = {
        name: (title, [event for event in events if event["fault"] == name])
        for name, title in (titles | {"broken_data": BROKEN}).items()
    }
    groups["all"] = ("all", events)
    phrases = {
        "scenes": "on scenes",
        "streamed": "on streamed shards",
        "indexed": "on indexed shards",
        "mixture": "on mixtures of shards",
        "broken": "with broken samples",
        "texts": "with texts without images",
        "accumulation": "with gradient accumulation",
        "scores": "with scores during training",
    }
    for part in ("scenes", "streamed", "indexed", "mixture", "broken", "2 workers", "2 ranks", *PARTS):
        title = phrases.get(part, f"with {part}")
        groups[part] = (f"of these, {title}", [event for event in events if part in event["case"]])
    return [{"run": name, "fault": title, **_counts(found)} for name, (title, found) in groups.items() if found]


def _counts(events: list[dict[str, str]]) -> dict[str, str]:
    lost = sum(bool(event["problem"]) or event["end"] != "same bits" for event in events)
    saves = sum(str(event["exit"]) == "143" and event["fault"] != "broken_data" for event in events)
    kills = sum(int(event["kills"]) for event in events)
    counts = {"tried": len(events), "survived": len(events) - lost, "lost": lost, KILLED: kills, SAVED: saves}
    return {name: str(number) for name, number in counts.items()}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    if rows:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def about(tried: int, seed: int) -> dict[str, str]:
    """The columns that every study has, but for the seconds."""
    from coca_lit.runs.run_folder import environment

    found = environment()
    command = f"python experiments/faults/soak.py --faults {tried} --seed {seed}"
    return {"seed": str(seed), **{key: found[key] for key in ("commit", "machine", "torch")}, "command": command}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="that are tried at least (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (%(default)s)")
    parser.add_argument("--out", type=Path, default=HERE, help="where the CSVs go (beside this file)")
    parser.add_argument("--keep", type=Path, help="new folder for the runs (default: a temporary one)")
    options = parser.parse_args()
    provenance, rows = about(options.faults, options.seed), []
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        soak = Soak((options.keep or Path(temporary)).resolve(), options.seed)
        for events in soak.until(options.faults):
            seconds = {"seconds": str(round(time.time() - soak.started))}
            rows = [row | provenance | seconds for row in summary(events)]
            write_csv(options.out / "events.csv", events)  # also what was done before somebody stops it
            write_csv(options.out / "results.csv", rows)
    sys.exit(not rows or any(row["lost"] != "0" for row in rows))


if __name__ == "__main__":
    main()
