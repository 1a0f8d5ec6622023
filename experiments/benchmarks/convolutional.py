"""Images/s of convolutional encoders on a CPU, timm's as they are and ours, training and encoding.

Ours has its channels last in memory, trains depthwise convolutions in fp32 under bf16, and the process keeps the memory
that it frees; the middle row is without the last of these.

OMP_NUM_THREADS=1 python experiments/benchmarks/convolutional.py
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from coca_lit.models.image import ImageEncoder
from coca_lit.models.kernels import keep_freed_memory
from experiments.benchmarks.harness import in_own_process, interleaved, ratio
from experiments.benchmarks.record import record

CSV = Path(__file__).with_suffix(".csv")
ENGINES = ("timm", "ours, memory given back", "ours")
ENCODERS = ("tf_efficientnet_lite2", "resnet50")
BATCH, SIZE = 16, 256


def main() -> None:
    parser = argparse.ArgumentParser(description="Images/s of convolutional encoders, ours and timm's.")
    parser.add_argument("--repetitions", type=int, default=3)
    repetitions = parser.parse_args().repetitions
    for name, precision, way in itertools.product(ENCODERS, ("fp32", "bf16"), ("training", "encoding")):
        seconds = {engine: in_own_process(measure, engine, name, precision, way, repetitions) for engine in ENGINES}
        rows = [
            {
                "case": f"{name}, {way}, {precision}",
                "engine": engine,
                "images/s": BATCH / min(seconds[engine]),
                "ratio": ratio(seconds["timm"], seconds[engine]),
            }
            for engine in ENGINES
        ]
        record(CSV, rows)


def measure(engine: str, name: str, precision: str, way: str, repetitions: int) -> list[float]:
    """CPU seconds for a batch."""
    torch.set_num_threads(1)
    if engine == "ours":
        keep_freed_memory()
    training = way == "training"
    plain = timm.create_model(name, num_classes=0, global_pool="")
    encoder: nn.Module = plain if engine == "timm" else ImageEncoder(name, SIZE)
    step = one_step(encoder.train(training), torch.randn(BATCH, 3, SIZE, SIZE), precision == "bf16", training)
    return interleaved({engine: step}, repetitions)[engine]


def one_step(encoder: nn.Module, images: Tensor, bf16: bool, training: bool) -> Callable[[], None]:
    def step() -> None:
        with torch.set_grad_enabled(training):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = encoder(images)
            if training:
                out.float().square().mean().backward()

    return step


if __name__ == "__main__":
    main()
