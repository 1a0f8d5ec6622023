"""Peak memory of a training step per sample, above weights and gradients, ours and OpenCLIP's: a fresh process each.

OMP_NUM_THREADS=1 python experiments/benchmarks/memory.py
"""

import argparse
import multiprocessing
from pathlib import Path

import torch

from experiments.benchmarks.harness import caption_batch, open_clip_model, peak_memory, same_weights
from experiments.benchmarks.record import record
from experiments.benchmarks.train_step import our_step, their_step

CSV = Path(__file__).with_suffix(".csv")
TARGETS = {"ours": {"fp32": 0.40, "bf16": 0.33}, "ours, cross-attention recomputed": {"fp32": 0.35, "bf16": 0.35}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of the training step, ours and OpenCLIP's.")
    parser.add_argument("--batch", type=int, default=16)
    batch = parser.parse_args().batch
    for precision in ("fp32", "bf16"):
        theirs = in_own_process("theirs", batch, precision)
        for engine, targets in TARGETS.items():
            ours = in_own_process(engine, batch, precision)
            row = {"precision": precision, "engine": engine, "MiB/sample": ours, "OpenCLIP MiB/sample": theirs}
            record(CSV, [row | {"ratio": ours / theirs, "target": f"at most {targets[precision]}"}])


def in_own_process(*arguments: object) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def measure(engine: str, batch: int, precision: str) -> float:
    """MiB per sample."""
    torch.set_num_threads(1)
    images, texts = caption_batch(batch)
    model = open_clip_model("coca_ViT-B-32").train()
    if engine == "theirs":
        step = their_step(model, images, texts, precision == "bf16")
    else:
        ours = same_weights(model).train()
        del model
        if engine != "ours":
            ours.set_grad_checkpointing("cross_attention")
        step = our_step(ours, images, texts, precision == "bf16")
    step()
    return peak_memory(step) / batch


if __name__ == "__main__":
    main()
