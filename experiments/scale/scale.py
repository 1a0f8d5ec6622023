"""Training on 8 to 384 GPUs, on paper: communication, memory, throughput, input, failures. Writes throughput.csv,
input.csv, failures.csv, the table of the page and failures.png.

python experiments/scale/scale.py
"""

import math
import random
from pathlib import Path
from typing import Any

import torch

from coca_lit.models import create_model
from coca_lit.tools.plan.estimate import (
    GPUS,
    Cost,
    Model,
    Recipe,
    flops,
    largest_batch,
    largest_micro_batch,
    measure,
    memory,
    samples_per_second,
)
from coca_lit.tools.plan.trace import cost
from experiments.scale.report import record

MODELS = {"B/32": ("coca_vit_b32", 224), "L/14": ("coca_vit_l14", 224), "2.1B": ("coca_2b", 288)}
NETWORK = {"A100": 25e9, "H100": 50e9}  # bytes/s of a GPU to other machines: 200 and 400 Gbit/s
PER_DEVICE, TOKENS = 240, 20
GPU_FAILURES = 0.17  # of a GPU in a year, all causes: an assumption, about what reports of 16,000-GPU runs come to
RECIPE = 29_000  # samples/s of OpenCLIP's CoCa L/14 on 384 A100
IMAGE = 28_000  # bytes of a stored image: photos of Flickr8k with 256 pixels on the shorter side, JPEG of quality 95
DECODED = 820  # samples/s of a core, shards to batches, on an AMD EPYC: benchmarks/input_pipeline.csv


def ddp_bytes(trained: float, devices: int) -> float:
    """Sent by a device in a step: a ring's all-reduce of fp32 gradients."""
    return 2 * (devices - 1) / devices * trained


def fsdp_bytes(weights: float, in_blocks: float, trained: float, devices: int) -> float:
    """Sent by a device in a step: blocks are gathered twice, the rest once, gradients are reduced and scattered."""
    return (devices - 1) / devices * (weights + in_blocks + trained)


def feature_bytes(per_device: int, width: int, devices: int) -> float:
    """Sent by a device in a step: gathered text features and their gradients back, and for each text the largest logit
    and the sum of the contrastive loss, which all devices need.
    """
    return 2 * (devices - 1) * per_device * 4 * (width + 2)


def young_daly(save: float, between: float) -> float:
    """Best seconds between checkpoints (Young 1974): √(2 · save · mean seconds between failures)."""
    return math.sqrt(2 * save * between)


def lost_share(interval: float, save: float, restart: float, between: float) -> float:
    """First-order share of time lost: saving, half an interval and a restart per failure."""
    return save / interval + (interval / 2 + restart) / between


def simulate(interval: float, save: float, restart: float, between: float, work: float, rng: random.Random) -> float:
    """Share of time lost when `work` seconds are done with failures at random moments, also while saving."""
    done = clock = 0.0
    failure = rng.expovariate(1 / between)
    while done < work:
        piece = min(interval, work - done) + save
        if clock + piece <= failure:
            clock, done = clock + piece, done + piece - save
        else:
            clock = failure + restart
            failure = clock + rng.expovariate(1 / between)
    return 1 - work / clock


def throughput_rows() -> list[dict[str, Any]]:
    rows = []
    for name, (preset, side) in MODELS.items():
        with torch.device("meta"):
            net = create_model(preset)
        model = measure(net)
        spent = cost(net, {"contrastive": 1, "caption": 2}, TOKENS, torch.bfloat16)
        for devices in (8, 64, 384):
            for engine in ("DDP", "FSDP2", "gradient caching"):
                recipe = Recipe(batch=PER_DEVICE * devices, devices=devices, sharded=engine == "FSDP2")
                row = {"model": name, "GPUs": devices, "engine": engine}
                rows.append(row | throughput(model, spent, recipe, engine == "gradient caching", 3 * side**2))
    return rows


def throughput(model: Model, spent: Cost, recipe: Recipe, caching: bool, pixels: int) -> dict[str, Any]:
    """
    Args:
        caching: in the largest micro-batches that fit.
        pixels: bytes of an image.
    """
    if caching:
        recipe = recipe._replace(micro_batch=largest_micro_batch(80, model, spent, recipe, pixels) or 1)
    devices = recipe.devices
    moved = fsdp_bytes(model.weights, model.in_blocks, model.trained, devices)
    sent = feature_bytes(PER_DEVICE, model.width, devices)
    sent += moved if recipe.sharded else ddp_bytes(model.trained, devices)
    row = {
        "GB sent/step": sent / 1e9,
        "GB fixed": sum(memory(model, spent, recipe).values()) / 1e9,
        "at a time": recipe.micro_batch or PER_DEVICE,
        "fit 80 GB": largest_batch(80, model, spent, recipe, pixels),
    }
    for gpu, speed in NETWORK.items():
        rate = samples_per_second(flops(model, spent, recipe), GPUS[gpu], GPUS[gpu].utilisation, True)
        compute, network = PER_DEVICE / rate, sent / speed
        row[f"{gpu} samples/s"] = PER_DEVICE * devices / max(compute, network)
        row[f"{gpu} network/compute"] = network / compute
    return row


def input_rows(throughputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What 384 GPUs take in: at the pace of the recipe, and as fast as they compute."""
    paces = {f"OpenCLIP's recipe, {RECIPE:,} samples/s": float(RECIPE)}
    for row in throughputs:
        if row["GPUs"] == 384 and row["engine"] == "DDP":
            paces |= {f"{row['model']} on {gpu}": row[f"{gpu} samples/s"] for gpu in NETWORK}
    return [
        {
            "384 GPUs": name,
            "samples/s of a GPU": pace / 384,
            "GB/s in all": pace * IMAGE / 1e9,
            "Gbit/s of a machine": 8 * 8 * pace / 384 * IMAGE / 1e9,
            "cores per GPU": pace / 384 / DECODED,
        }
        for name, pace in paces.items()
    ]


def failure_rows(save: float = 30, restart: float = 300) -> list[dict[str, Any]]:
    rows = []
    for gpus in (8, 64, 384):
        between = 365 * 86400 / (gpus * GPU_FAILURES)
        for label, interval in (("best (Young)", young_daly(save, between)), ("15 min (default)", 900.0)):
            runs = [simulate(interval, save, restart, between, 2 * between, random.Random(i)) for i in range(30)]
            rows.append(
                {
                    "GPUs": gpus,
                    "failures/week": 7 * 86400 / between,
                    "checkpoint every": label,
                    "minutes": interval / 60,
                    "lost %, formula": 100 * lost_share(interval, save, restart, between),
                    "lost %, simulated": 100 * sum(runs) / len(runs),
                }
            )
    return rows


def draw(save: float = 30, restart: float = 300) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    minutes = [1, 2, 4, 8, 15, 30, 60, 120, 240]
    for gpus in (8, 64, 384):
        between = 365 * 86400 / (gpus * GPU_FAILURES)
        axes.plot(minutes, [100 * lost_share(60 * m, save, restart, between) for m in minutes], label=f"{gpus} GPUs")
        runs = [
            [simulate(60 * m, save, restart, between, between, random.Random(i)) for i in range(20)]
            for m in minutes[4:]
        ]
        axes.plot(minutes[4:], [100 * sum(r) / len(r) for r in runs], "k.", markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="minutes between checkpoints", ylabel="% of the time lost")
    axes.legend(title="lines: formula, dots: simulated")
    figure.savefig(Path(__file__).parent / "failures.png", dpi=110)


def main() -> None:
    throughputs = throughput_rows()
    record("throughput", throughputs)
    record("input", input_rows(throughputs))
    record("failures", failure_rows())
    draw()


if __name__ == "__main__":
    main()
