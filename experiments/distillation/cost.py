"""What stored teachers cost a training step.

    OMP_NUM_THREADS=1 python experiments/distillation/cost.py SHARDS     # with teachers, as run.sh makes them

The CPU time of a long training minus that of a short one, in turns, so that neither start nor other load counts.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from experiments.benchmarks.harness import ratio
from experiments.benchmarks.record import provenance
from experiments.study import write_rows

ROOT = Path(__file__).resolve().parents[2]
SHORT, LONG = 20, 120  # steps
TERM = "+model.objectives.teachers"
WAYS = {
    "pairs alone": (),
    "two teachers": (f"{TERM}._target_=coca_lit.projects.distillation.objective.Distillation", f"{TERM}.weight=0.7"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU seconds of a step with and without stored teachers.")
    parser.add_argument("shards", type=Path)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    shards = options.shards.resolve()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.repetitions):
        for way, words in WAYS.items():
            taught = (f"data.teachers={shards}", "model.contrastive_weight=0.3") if words else ()
            long, short = (training(shards, steps, *words, *taught) for steps in (LONG, SHORT))
            seconds[way].append((long - short) / (LONG - SHORT))
    about = {name: provenance()[name] for name in ("commit", "machine", "command")} | {"torch": version("torch")}
    rows = [
        {
            "way": way,
            "CPU seconds a step": f"{statistics.median(found):.3f}",
            "relative to pairs alone": str(ratio(found, seconds["pairs alone"])),
        }
        for way, found in seconds.items()
    ]
    write_rows(Path(__file__).with_suffix(".csv"), [row | about for row in rows])


def training(shards: Path, steps: int, *words: str) -> float:
    """CPU seconds of a training of `run.sh` with this many steps."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        command = (
            *(sys.executable, str(ROOT / "train.py"), f"output_dir={folder}/run", "trainer=cpu", "threads=1"),
            *("experiment=scenes", "data=laion", f"data.shards={shards}", "data.epoch_samples=15360"),
            *("data.batch_size=64", "callbacks.checkpoint=null"),
            *("data.num_workers=0", "data.caption_keys={original_caption: 1}", "model.warmup_steps=30", "evals=[]"),
            *(f"trainer.max_steps={steps}", *words),
        )
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
