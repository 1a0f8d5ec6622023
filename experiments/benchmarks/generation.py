"""Time per caption and peak memory, side by side with OpenCLIP's `generate`: same weights and images.

    pip install open_clip_torch==3.3.0 transformers==4.56.2   # OpenCLIP 3.3.0 needs that release to generate
    OMP_NUM_THREADS=1 python experiments/benchmarks/generation.py

Each engine lives in a process of its own, which imports no other and is where its peak memory is read: that of the
modules, the weights and the writing. The processes take turns, one repetition each, so that a disturbance of the
machine meets all of them; ratios are taken repetition by repetition.
As in coca-caption, which writes many batches, bf16 weights are packed before the first and not in each: without that
add 0.15 to 0.2 s to a batch. Weights are random, so that no caption ends early: all 30 tokens are written. In fp32 the
captions must be OpenCLIP's; bf16 changes some of random weights, where the best tokens are nearly tied. Rows go to
generation.csv.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coca_lit.models.kernels import packed_weights
from coca_lit.weights.open_clip import from_open_clip
from experiments.benchmarks.harness import forget_peak, memory, open_clip_model
from experiments.benchmarks.record import record

STRATEGIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # OpenCLIP's arguments, ours
    "greedy": ({"generation_type": "top_k"}, {"min_length": 5}),
    "beam": ({}, {"strategy": "beam", "scoring": "openclip_legacy"}),
}
ENGINES = ("open_clip", "fp32", "bf16")


class Measurement(NamedTuple):
    seconds: float  # of the process, for each caption
    memory: float  # peak of the process while writing, in MB, weights included
    ids: list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of generation, ours and OpenCLIP's.")
    parser.add_argument("--model", default="coca_ViT-B-32", help="an OpenCLIP model")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    args = parser.parse_args()
    wrong = []
    for strategy in args.strategies:
        for batch in args.batches:
            rows = compare(args.model, strategy, batch, args.repetitions)
            record(Path(__file__).with_suffix(".csv"), rows)
            wrong += [row for row in rows if row["engine"] == "fp32" and row["equal"] != batch]
    if wrong:
        sys.exit(f"fp32 captions differ from OpenCLIP's: {wrong}")


def compare(name: str, strategy: str, batch: int, repetitions: int) -> list[dict[str, Any]]:
    """One row per engine, from repetitions that take turns."""
    pools = {engine: multiprocessing.get_context("spawn").Pool(1) for engine in ENGINES}
    with tempfile.TemporaryDirectory() as folder:
        for engine, pool in pools.items():
            pool.apply(prepare, (name, engine, Path(folder, "weights.pt")))
    rounds = [{e: pool.apply(measure, (strategy, batch)) for e, pool in pools.items()} for _ in range(repetitions)]
    for pool in pools.values():
        pool.terminate()
    rows = []
    for engine in ENGINES:
        ratios = [each["open_clip"].seconds / each[engine].seconds for each in rounds]
        same = zip(rounds[0][engine].ids, rounds[0]["open_clip"].ids, strict=True)
        rows.append(
            {
                "model": name,
                "strategy": strategy,
                "batch": batch,
                "engine": engine,
                "repetitions": repetitions,
                "seconds_per_caption": statistics.median(each[engine].seconds for each in rounds),
                "ratio": statistics.median(ratios),
                "lowest_ratio": min(ratios),
                "highest_ratio": max(ratios),
                "peak_MB": rounds[0][engine].memory,  # later rounds keep what earlier ones have allocated
                "equal": sum(ours == theirs for ours, theirs in same),
            }
        )
    return rows


engine_model: tuple[Any, bool]  # of this process, and whether it is OpenCLIP's


def prepare(name: str, engine: str, weights: Path) -> None:
    """Builds the engine's model. OpenCLIP's comes first and leaves its random weights for the others."""
    global engine_model
    if engine == "open_clip":
        theirs = open_clip_model(name).eval()
        torch.save(theirs.state_dict(), weights)
        engine_model = theirs, True
    else:
        ours = from_open_clip(torch.load(weights)).eval()
        engine_model = (ours.bfloat16() if engine == "bf16" else ours), False


@torch.no_grad()
def measure(strategy: str, batch: int) -> Measurement:
    model, is_theirs = engine_model
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    options = STRATEGIES[strategy][0 if is_theirs else 1]
    with nullcontext() if is_theirs else packed_weights(model):
        model.generate(images[:1], **options | ({"seq_len": 7} if is_theirs else {"max_length": 7}))  # warm up
        forget_peak()  # that of building the model, and the model that the weights came from
        start = time.process_time()
        captions = model.generate(images, **options)
        seconds = time.process_time() - start
    return Measurement(seconds / batch, memory("VmHWM"), padded(captions))


def padded(captions: Tensor, length: int = 30) -> list[list[int]]:
    return [row + [0] * (length - len(row)) for row in captions.tolist()]


if __name__ == "__main__":
    main()
