"""Training on 8 to 384 GPUs, on paper: communication, memory, throughput, failures. Writes tables.csv, the tables of
the README and failures.png.

python experiments/scale/scale.py
"""

import csv
import math
import random
from pathlib import Path
from typing import Any

import torch

from coca_lit.models import create_model
from coca_lit.plan.estimate import Recipe, flops, largest_batch, measure, memory, per_sample, samples_per_second
from coca_lit.plan.hardware import GPUS
from coca_lit.plan.trace import cost

FOLDER = Path(__file__).resolve().parent
MODELS = {"B/32": ("coca_vit_b32", 224), "L/14": ("coca_vit_l14", 224), "2.1B": ("coca_2b", 288)}
NETWORK = {"A100": 25e9, "H100": 50e9}  # bytes/s of a GPU to other machines: 200 and 400 Gbit/s
UTILISATION = {"A100": 0.4, "H100": 0.3}
PER_DEVICE, TOKENS = 240, 20
GPU_FAILURES = 0.17  # of a GPU in a year, all causes: an assumption, about what reports of 16,000-GPU runs come to


def ddp_bytes(trained: float, devices: int) -> float:
    """Sent by a device in a step: a ring's all-reduce of fp32 gradients."""
    return 2 * (devices - 1) / devices * trained


def fsdp_bytes(weights: float, in_blocks: float, trained: float, devices: int) -> float:
    """Sent by a device in a step: blocks are gathered twice, the rest once, gradients are reduced and scattered."""
    return (devices - 1) / devices * (weights + in_blocks + trained)


def feature_bytes(per_device: int, width: int, devices: int) -> float:
    """Sent by a device in a step: gathered text features, and their gradients back."""
    return 2 * (devices - 1) * per_device * width * 4


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
                recipe = Recipe(
                    batch=PER_DEVICE * devices,
                    devices=devices,
                    sharded=engine == "FSDP2",
                    micro_batch=30 if engine == "gradient caching" else None,
                )
                fixed = sum(memory(model, spent, recipe).values())
                sample = per_sample(model, spent, recipe, 3 * side**2)
                own = feature_bytes(PER_DEVICE, model.width, devices)
                moved = fsdp_bytes(model.weights, model.weights - model.unsharded, model.trained, devices)
                sent = own + (moved if recipe.sharded else ddp_bytes(model.trained, devices))
                row = {"model": name, "GPUs": devices, "engine": engine, "GB sent/step": sent / 1e9}
                row |= {"GB fixed": fixed / 1e9, "fit 80 GB": largest_batch(80, fixed, sample, recipe.micro_batch)}
                for gpu, speed in NETWORK.items():
                    rate = samples_per_second(flops(model, spent, recipe), GPUS[gpu], UTILISATION[gpu], True)
                    compute, network = PER_DEVICE / rate, sent / speed
                    row[f"{gpu} samples/s"] = PER_DEVICE * devices / max(compute, network)
                    row[f"{gpu} network/compute"] = network / compute
                rows.append(row)
    return rows


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


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_text(v) for v in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: Any) -> str:
    if isinstance(value, str | int):
        return f"{value:,}" if isinstance(value, int) else value
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


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
    figure.savefig(FOLDER / "failures.png", dpi=110)


def main() -> None:
    readme = FOLDER / "README.md"
    text = readme.read_text()
    tables = {"throughput": throughput_rows(), "failures": failure_rows()}
    for name, rows in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{markdown(rows)}\n{end}{rest.partition(end)[2]}"
        with (FOLDER / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    readme.write_text(text)
    draw()


if __name__ == "__main__":
    main()
