"""Speed while other programs use the cores: how threads wait for each other, and how many there are.

    python experiments/benchmarks/busy.py          # 40 minutes on two cores

For none, one and two programs that never rest, every task runs in fresh processes, as OpenMP's settings are read once.
The ways take turns.
"""

import argparse
import csv
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.benchmarks.record import record

ROOT = Path(__file__).resolve().parents[2]
WAYS = {  # environment and threads
    "long waits": ({"GOMP_SPINCOUNT": "300000"}, None),  # libgomp's own
    "as shipped": ({}, None),
    "one thread": ({}, 1),
}
SMALL = ("trainer=cpu", "trainer.precision=32-true", "evals=[]", "callbacks.checkpoint=null", "output_dir=run")
TRAININGS = {
    "training, demo": (*SMALL, "trainer.max_steps=60", "trainer.log_every_n_steps=10"),
    "training, B/32, batch 8": (
        *("experiment=pretrain_b32", "data=scenes", *SMALL, "data.batch_size=8", "data.train_count=64"),
        *("trainer.max_steps=5", "trainer.log_every_n_steps=1", "trainer.limit_val_batches=0"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--programs", type=int, nargs="+", default=[0, 1, 2], help="that never rest (0 1 2)")
    parser.add_argument("--task", nargs="+", choices=[*TRAININGS, *TASKS], default=[*TRAININGS, *TASKS])
    parser.add_argument("--child", choices=TASKS, help="runs a task and prints its speed")
    options = parser.parse_args()
    if options.child:
        print(TASKS[options.child]())
        return
    for programs in options.programs:
        for task in options.task:
            found: dict[str, list[float]] = {way: [] for way in WAYS}
            with busy(programs):
                for _ in range(options.repetitions):
                    for way in WAYS:
                        found[way].append(speed(task, way))
            shipped = statistics.median(found["as shipped"])
            record(
                Path(__file__).with_suffix(".csv"),
                [
                    {
                        "case": task,
                        "other programs": programs,
                        "way": way,
                        "samples/s": f"{statistics.median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f})",
                        "of as shipped": f"{statistics.median(rates) / shipped:.2f}",
                    }
                    for way, rates in found.items()
                ],
            )


@contextmanager
def busy(programs: int) -> Iterator[None]:
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
    try:
        yield
    finally:
        for program in started:
            program.kill()
            program.wait()


def speed(task: str, way: str) -> float:
    """Samples per second of a fresh process."""
    settings, threads = WAYS[way]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment = clean | {"PYTHONPATH": str(ROOT)} | settings
    with tempfile.TemporaryDirectory() as folder:
        if task in TRAININGS:
            words = [str(ROOT / "train.py"), *TRAININGS[task], *([f"threads={threads}"] if threads else [])]
            subprocess.run([sys.executable, *words], cwd=folder, env=environment, check=True, capture_output=True)
            rows = csv.DictReader(io.StringIO((Path(folder) / "run" / "metrics.csv").read_text()))
            rates = [float(row["samples/s"]) for row in rows if row.get("samples/s")]
            return statistics.median(rates[1:])  # the first steps are slow
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        command = [sys.executable, __file__, "--child", task]
        done = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
        return float(done.stdout.split()[-1])


def _rate(work: Callable[[], object], samples: int, seconds: float = 8.0) -> float:
    """Samples per second, after a first turn."""
    work()
    turns, began = 0, time.monotonic()
    while turns == 0 or time.monotonic() - began < seconds:
        work()
        turns += 1
    return turns * samples / (time.monotonic() - began)


def captions() -> float:
    """B/32, 30 tokens each, eight at a time."""
    from coca_lit.cli.runtime import configure_libraries
    from coca_lit.machine import set_up_environment

    set_up_environment()
    import torch

    from coca_lit.models import create_model

    configure_libraries(None)
    torch.manual_seed(0)
    model = create_model("coca_vit_b32").eval()
    images = torch.randn(8, 3, 224, 224)
    with torch.inference_mode():
        return _rate(lambda: model.generate(images, strategy="greedy", min_length=29, max_length=30), len(images))


def photos() -> float:
    """Decoded and resized, in one process."""
    from PIL import Image

    from coca_lit import build_transform

    file = io.BytesIO()
    Image.effect_noise((640, 480), 60).convert("RGB").save(file, "JPEG", quality=85)
    transform = build_transform()
    return _rate(lambda: [transform(Image.open(io.BytesIO(file.getvalue()))) for _ in range(20)], 20)


TASKS: dict[str, Callable[[], float]] = {"captions, B/32": captions, "photos, decoded": photos}


if __name__ == "__main__":
    main()
