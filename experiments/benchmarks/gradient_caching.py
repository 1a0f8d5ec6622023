"""Peak memory and time of a training step in micro-batches against the whole batch: the same loss, coca_ViT-B-32.

Memory is above the weights and their gradients, a fresh process each.

OMP_NUM_THREADS=1 python experiments/benchmarks/gradient_caching.py
"""

import argparse
import multiprocessing
import time
from pathlib import Path

import torch

from coca_lit.data.batch import Batch
from coca_lit.models import create_model, text_lengths
from coca_lit.training.gradient_caching import cached_loss
from coca_lit.training.objectives import Captions, Contrastive, terms_of
from experiments.benchmarks.harness import caption_batch, peak_memory
from experiments.benchmarks.record import record

CSV = Path(__file__).with_suffix(".csv")
OBJECTIVES = (Contrastive(1.0), Captions(2.0))


def main() -> None:
    parser = argparse.ArgumentParser(description="Gradient caching: memory and time.")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--micro", type=int, nargs="+", default=[32, 16, 8])
    args = parser.parse_args()
    whole = in_own_process(args.batch, None)
    for size in (None, *args.micro):
        memory, seconds, loss = in_own_process(args.batch, size) if size else whole
        row = {
            "case": f"micro-batches of {size}" if size else "whole batch",
            "batch": args.batch,
            "MiB": memory,
            "CPU s": seconds,
        }
        row |= {"memory": memory / whole[0], "time": seconds / whole[1], "loss difference": abs(loss - whole[2])}
        record(CSV, [row])


def in_own_process(*arguments: object) -> tuple[float, float, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def measure(batch: int, size: int | None) -> tuple[float, float, float]:
    """MiB above weights and gradients, CPU seconds, loss."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = create_model("coca_vit_b32").train()
    images, tokens = caption_batch(batch)
    lengths = text_lengths(tokens, net.tokenizer.pad_id)
    values = []

    def step(count: int = batch) -> None:
        # Gradients stay in place, as in a run that accumulates them, so that they are not counted.
        for p in net.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        pairs = Batch(images[:count], tokens[:count], lengths[:count], [])
        if size is None:
            loss = terms_of(net, OBJECTIVES, pairs).weighted_sum(OBJECTIVES)
        else:
            loss, _ = cached_loss(net, OBJECTIVES, pairs, min(size, count))
        loss.backward()
        values.append(loss.item())

    step(2)  # warm up
    start = time.process_time()
    memory = peak_memory(step)
    return memory, time.process_time() - start, values[-1]


if __name__ == "__main__":
    main()
