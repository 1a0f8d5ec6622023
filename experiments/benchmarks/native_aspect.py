"""Image tokens per second of a training step of coca2-moderntext-naflex_ViT-B-32: photos in their own aspect ratio
against squares, and smaller images in larger batches. Captions of 12 words.

OMP_NUM_THREADS=1 python experiments/benchmarks/native_aspect.py
"""

import argparse
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from coca_lit.losses import loss_terms
from coca_lit.models import CoCa, create_model
from coca_lit.models.inputs import Images, stack_images
from coca_lit.projects.naflex.inputs import AnyShape, Patches
from experiments.benchmarks.harness import interleaved, ratio
from experiments.benchmarks.record import record

CSV = Path(__file__).with_suffix(".csv")
SHAPES = [(480, 640), (640, 480), (427, 640), (360, 640), (500, 500), (640, 427), (333, 500), (375, 500)]  # of photos
BUDGETS = (64, 32, 16)  # 8, 16 and 32 images


def main() -> None:
    parser = argparse.ArgumentParser(description="Image tokens per second of images of any shape.")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = create_model("coca2-moderntext-naflex_ViT-B-32").train()
    cases: dict[str, Images] = {
        "squares, 64 patches": torch.randint(0, 256, (args.batch, 3, 256, 256), dtype=torch.uint8)
    }
    cases |= {f"photos, {b} patches": photos(args.batch * BUDGETS[0] // b, b) for b in BUDGETS}
    seconds = interleaved({name: step(net, images) for name, images in cases.items()}, args.repetitions)
    squares = seconds["squares, 64 patches"]
    for name, images in cases.items():
        tokens = int(images.counts.sum()) if isinstance(images, Patches) else len(images) * BUDGETS[0]
        took = statistics.median(seconds[name])
        places = images.rows.shape[1] * len(images) if isinstance(images, Patches) else tokens
        row = {"case": name, "images": len(images), "image tokens": tokens, "padding": 1 - tokens / places}
        row |= {"CPU s": took, "image tokens/s": tokens / took, "images/s": len(images) / took}
        record(CSV, [row | {"time of squares": str(ratio(seconds[name], squares))}])


def photos(count: int, budget: int) -> Patches:
    kind, rng = AnyShape(32, budget), random.Random(0)
    pixels = (torch.randint(0, 256, (3, *SHAPES[i % len(SHAPES)]), dtype=torch.uint8) for i in range(count))
    images = stack_images([kind.augmented(image, rng) for image in pixels])
    assert isinstance(images, Patches)
    return images


def step(net: CoCa, images: Images) -> Callable[[], None]:
    tokens = torch.randint(100, 50000, (len(images), 14))
    lengths = torch.full((len(images),), 14)

    def run() -> None:
        net.zero_grad(set_to_none=True)
        torch.stack([*loss_terms(net(images, tokens, lengths)).values()]).sum().backward()

    return run


if __name__ == "__main__":
    main()
