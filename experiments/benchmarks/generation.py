"""Time per caption and peak memory, side by side with OpenCLIP's `generate`: same weights and images, a process each.

    pip install open_clip_torch==3.3.0 transformers==4.56.2   # OpenCLIP 3.3.0 needs that release to generate
    OMP_NUM_THREADS=1 python experiments/benchmarks/generation.py --batch 8

Weights are random, so that no caption ends early: all 30 tokens are written. Times are of the process, not of the wall,
so that neighbours on the machine disturb them little. Low precision changes some captions of random weights, where the
best tokens are nearly tied.
"""

import argparse
import ctypes
import gc
import multiprocessing
import time
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor, nn

from coca_lit.models import CoCa
from coca_lit.models.open_clip import from_open_clip

STRATEGIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # OpenCLIP's arguments, ours
    "greedy": ({"generation_type": "top_k"}, {"min_length": 5}),
    "beam": ({}, {"strategy": "beam", "scoring": "openclip_legacy"}),
}
PROCESS = Path("/proc/self")  # peak memory is read there, so this runs on Linux only
ENGINES = ("open_clip", "fp32", "fp32 oneDNN", "bf16")


class Measurement(NamedTuple):
    seconds: float  # of CPU time for each caption, the best of the repetitions
    memory: float  # peak of the process while writing, in MB, weights included
    ids: list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of generation, ours and OpenCLIP's.")
    parser.add_argument("--model", default="coca_ViT-B-32", help="an OpenCLIP model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    args = parser.parse_args()
    print(f"{args.model}, batch {args.batch}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    print(f"{'strategy':10}{'engine':14}{'s/caption':>10}{'ratio':>8}{'MB':>8}  captions equal to OpenCLIP's")
    for strategy in args.strategies:
        reference: Measurement | None = None
        for engine in ENGINES:
            found = in_own_process(args.model, strategy, engine, args.batch, args.repetitions)
            reference = reference or found
            same = sum(a == b for a, b in zip(found.ids, reference.ids, strict=True))
            ratio = reference.seconds / found.seconds
            print(
                f"{strategy:10}{engine:14}{found.seconds:10.3f}{ratio:8.1f}{found.memory:8.0f}  {same}/{args.batch}",
                flush=True,
            )


def in_own_process(*arguments: Any) -> Measurement:
    """Peak memory is that of a process, so each measurement needs a fresh one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


@torch.no_grad()
def measure(name: str, strategy: str, engine: str, batch: int, repetitions: int) -> Measurement:
    if engine == "fp32 oneDNN":
        torch.set_float32_matmul_precision("medium")  # lets CPU products go through oneDNN
    model, images = (
        random_model(name, engine),
        torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1)),
    )
    options = STRATEGIES[strategy][engine != "open_clip"]
    model.generate(images[:1], **options | ({"seq_len": 7} if engine == "open_clip" else {"max_length": 7}))  # warm up
    gc.collect()  # the model that the weights came from, and its memory back to the system
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    PROCESS.joinpath("clear_refs").write_text("5")  # forgets the peak of building the model
    seconds = []
    for _ in range(repetitions):
        start = time.process_time()
        captions = model.generate(images, **options)
        seconds.append(time.process_time() - start)
    return Measurement(min(seconds) / batch, peak_memory(), padded(captions))


def random_model(name: str, engine: str) -> CoCa | nn.Module:
    """OpenCLIP's model with random weights, or ours with the same ones."""
    torch.manual_seed(0)
    theirs = open_clip.create_model(name, load_weights=False).eval()
    nn.init.normal_(theirs.text_decoder.text_projection, std=0.05)  # OpenCLIP leaves it at zero
    if engine == "open_clip":
        return theirs
    ours = from_open_clip(theirs.state_dict()).eval()
    return ours.bfloat16() if engine == "bf16" else ours


def padded(captions: Tensor, length: int = 30) -> list[list[int]]:
    return [row + [0] * (length - len(row)) for row in captions.tolist()]


def peak_memory() -> float:
    status = dict(line.split(":", 1) for line in PROCESS.joinpath("status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


if __name__ == "__main__":
    main()
