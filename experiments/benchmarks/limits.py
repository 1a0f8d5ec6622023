"""How near the hardware's limits a training step and a token come, on one core.

    OMP_NUM_THREADS=1 python experiments/benchmarks/limits.py

A step is bound by matrix products: its FLOP/s, with FLOPs as `coca-plan` counts them, over the FLOP/s of the fastest
large product. A token is bound by memory: the bytes of weights and of cached keys and values that it reads, per second,
over the fastest reading.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coca_lit.models import CoCa, create_model
from coca_lit.models.kernels import packed_weights
from coca_lit.models.kernels.process import use_fp32_matmul
from coca_lit.tools.plan.trace import cost
from experiments.benchmarks.harness import caption_batch, interleaved
from experiments.benchmarks.record import record
from experiments.benchmarks.train_step import our_step

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = (1024, 2048, 4096)  # of square products
READ = 2**30  # bytes, more than the caches hold
LONG, SHORT = 30, 6  # tokens of captions, whose difference is the time of the tokens between
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description="Shares of the machine's peak that a step and a token reach.")
    parser.add_argument("--repetitions", type=int, default=3)
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(1)
    use_fp32_matmul("auto")
    products = {name: fastest_product(dtype, repetitions) for name, dtype in PRECISIONS.items()}
    reading = fastest_reading(repetitions)
    rows: list[dict[str, Any]] = []
    for name, dtype in PRECISIONS.items():
        flops, seconds = training_step(dtype, repetitions)
        reached = {"reached": flops / seconds / 1e9, "peak": products[name] / 1e9}
        rows.append({"case": f"training step, {name}", "limit": "products, GFLOP/s", **reached})
    for name, dtype in PRECISIONS.items():
        for images in (8, 1):
            read, seconds = token(dtype, images, repetitions)
            reached = {"reached": read / seconds / 1e9, "peak": reading / 1e9}
            case = f"a token of {images} greedy caption{'s' * (images > 1)}, {name}"
            rows.append({"case": case, "limit": "memory, GB/s", **reached})
    record(
        Path(__file__).with_suffix(".csv"),
        [row | {"share": row["reached"] / row["peak"], "repetitions": repetitions} for row in rows],
    )


def fastest(work: Callable[[], object], repetitions: int) -> float:
    """CPU seconds of the fastest of some turns after the first."""
    return min(interleaved({"": work}, repetitions)[""])


def fastest_product(dtype: torch.dtype, repetitions: int) -> float:
    """FLOP/s of the best square product."""
    return max(2 * n**3 / fastest(_product(torch.randn(n, n).to(dtype)), repetitions) for n in SIZES)


def _product(square: Tensor) -> Callable[[], object]:
    out = torch.empty_like(square)
    return lambda: torch.mm(square, square, out=out)


def fastest_reading(repetitions: int) -> float:
    """Bytes per second of a matrix times a vector, which computes little beside reading the matrix."""
    matrix = torch.randn(READ // 4 // 4096, 4096)
    vector = torch.randn(4096)
    return READ / fastest(lambda: torch.mv(matrix, vector), repetitions)


def training_step(dtype: torch.dtype, repetitions: int) -> tuple[float, float]:
    """FLOPs and CPU seconds of a step of B/32 as `train_step.py` times it. All captions count with their mean length;
    the logits of the contrastive loss are not counted.
    """
    images, texts = caption_batch(BATCH)
    lengths = (texts != 0).sum(dim=1)
    with torch.device("meta"):
        shapes = create_model("coca_vit_b32")
    autocast = None if dtype == torch.float32 else dtype
    spent = cost(shapes, {"contrastive": 1.0, "caption": 2.0}, round(lengths.float().mean().item()), autocast)
    step = our_step(create_model("coca_vit_b32").train(), images, texts, autocast is not None)
    return BATCH * spent.total, fastest(step, repetitions)


@torch.inference_mode()
def token(dtype: torch.dtype, images: int, repetitions: int) -> tuple[float, float]:
    """Bytes that one more token of each caption reads, and its CPU seconds."""
    torch.manual_seed(0)
    model = create_model("coca_vit_b32").eval().to(dtype)
    pixels = torch.randn(images, 3, 224, 224, generator=torch.Generator().manual_seed(1)).to(dtype)

    def write(tokens: int) -> Callable[[], object]:
        return lambda: model.generate(pixels, min_length=tokens - 1, max_length=tokens)

    with packed_weights(model):
        seconds = fastest(write(LONG), repetitions) - fastest(write(SHORT), repetitions)
    return bytes_of_token(model, images), seconds / (LONG - SHORT)


def bytes_of_token(model: CoCa, images: int) -> int:
    """Weights of the text tower and the decoder that every token multiplies, and keys and values of the image tokens of
    each caption. Keys and values of the caption itself are left out, and of embeddings a token reads one row.
    """
    assert model.decoder is not None
    weights = [
        parameter
        for part in (model.text, model.decoder)
        for name, parameter in part.named_parameters()
        if not any(once in name for once in ("embedding", "attention.kv", "projection"))
    ]
    sizes = model.config
    image_tokens = 2 * sizes.decoder_layers * sizes.pooler_queries * sizes.text_width * images
    numbers = sum(parameter.numel() for parameter in weights) + image_tokens
    return numbers * weights[0].element_size()


if __name__ == "__main__":
    main()
