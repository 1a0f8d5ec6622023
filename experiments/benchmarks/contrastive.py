"""Time and peak memory of the contrastive losses at large batches, forward and backward: tiled, the plain formula on
the whole matrix, and OpenCLIP's. A fresh process each for memory; for time, side by side in one. At 16,384 pairs the
plain formulas need 5 GiB.

OMP_NUM_THREADS=1 python experiments/benchmarks/contrastive.py
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from coca_lit.losses import contrastive_loss, siglip_loss
from experiments.benchmarks.harness import in_own_process, interleaved, peak_memory, ratio
from experiments.benchmarks.record import record

CSV = Path(__file__).with_suffix(".csv")
WIDTH = 512  # of the features of ViT-B/32
TARGETS = {"softmax": "1.3x the speed, at most 0.1x the memory at 16384"}


def plain(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    targets = torch.arange(len(images))
    by_image, by_text = scale * images @ texts.T, scale * texts @ images.T
    return (F.cross_entropy(by_image, targets) + F.cross_entropy(by_text, targets)) / 2


LOSSES: dict[str, dict[str, Callable[..., Tensor]]] = {
    "softmax": {
        "tiled": lambda i, t, s, b: contrastive_loss(i, t, s),
        "plain": plain,
        "OpenCLIP": lambda i, t, s, b: ClipLoss()(i, t, s),
    },
    "siglip": {"tiled": siglip_loss, "OpenCLIP": SigLipLoss()},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Contrastive losses at large batches.")
    parser.add_argument("--batches", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--repetitions", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for batch in args.batches:
        for kind, losses in LOSSES.items():
            seconds = interleaved({name: step(kind, name, batch) for name in losses}, args.repetitions)
            ours = in_own_process(memory_of, kind, "tiled", batch)
            for other in [name for name in losses if name != "tiled"]:
                row = {"case": f"{kind}, tiled against {other}", "batch": batch, "tiled s": min(seconds["tiled"])}
                row |= {"speed": str(ratio(seconds[other], seconds["tiled"])), "tiled MiB": ours}
                memory = ours / in_own_process(memory_of, kind, other, batch)
                record(CSV, [row | {"memory": memory, "target": TARGETS.get(kind, "")}])


def memory_of(kind: str, name: str, batch: int) -> float:
    """Peak MiB above the features."""
    torch.set_num_threads(1)
    step(kind, name, 64)()  # warm up
    return peak_memory(step(kind, name, batch))


def step(kind: str, name: str, batch: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    images, texts = F.normalize(torch.randn(2, batch, WIDTH, generator=generator), dim=-1)
    inputs = (images, texts, torch.tensor([30.0]), torch.tensor([-10.0]))
    leaves = [x.requires_grad_() for x in inputs]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        LOSSES[kind][name](*leaves).backward()

    return run


if __name__ == "__main__":
    main()
