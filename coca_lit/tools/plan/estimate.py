"""From the cost of a sample to memory per device, samples per second and device-hours; what is assumed of the GPUs, and
how well they are used; and the plan as tables in the terminal.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from coca_lit.errors import check_number, suggest
from coca_lit.machine import memory_bytes
from coca_lit.models import CoCa
from coca_lit.tools.plan.trace import Cost
from coca_lit.training.sharding import blocks

USABLE = 0.92  # share of a GPU's memory; the rest goes to the CUDA context, communication buffers and fragmentation
TILE = 256  # rows of contrastive logits that exist at a time
# Seconds of the host to launch an operation, gradients included: 5 to 10 µs in PyTorch without compilation or graphs.
LAUNCH = 6e-6
MEASURED = 0.155  # share of an A100's peak in OpenCLIP's published training of L/14: 75.5 samples/s of 642 GFLOP


class Gpu(NamedTuple):
    """Peaks from the makers' data sheets: dense products, accumulated in fp32. A training step reaches a share of them
    between `MEASURED` and an assumption, from published runs: 0.15 to 0.4 on an A100, 0.2 to 0.3 on an H100.
    """

    bf16: float  # TFLOP/s
    tf32: float  # TFLOP/s, for products in fp32
    memory: float  # GB
    utilisation: float  # share of the peak in a good run


GPUS = {
    "A100-40GB": Gpu(312, 156, 40, 0.30),
    "A100": Gpu(312, 156, 80, 0.30),
    "H100": Gpu(989, 494, 80, 0.22),
    "H200": Gpu(989, 494, 141, 0.22),
    "L40S": Gpu(362, 183, 48, 0.30),
    "RTX-4090": Gpu(165, 83, 24, 0.30),
}


@dataclass(frozen=True)
class Settings:
    """
    Args:
        gpus: keys of `GPUS`.
        utilisation: share of the peak that a training step reaches; None: from `MEASURED` to each GPU's own.
        caption_tokens: mean length of the captions, start and end included.
        devices: number of GPUs in the run; None takes it from the trainer if that has a number; else 8, or
            as many as get 16 pairs of a batch each.
        samples: samples in the whole training; None takes them from the config.

    Raises:
        ValueError: an unknown GPU or none, or a number out of its range.
    """

    gpus: Sequence[str]
    utilisation: float | None
    caption_tokens: int
    devices: int | None
    samples: float | None

    def __post_init__(self) -> None:
        if not self.gpus:
            raise ValueError(f"gpus must name at least one of {', '.join(GPUS)}")
        for name in self.gpus:
            if name not in GPUS:
                raise ValueError(f"gpus: there is no '{name}'{suggest(name, GPUS)} Known: {', '.join(GPUS)}")
        check_number("caption_tokens", self.caption_tokens, whole=True, at_least=2)
        if self.utilisation is not None:
            check_number("utilisation", self.utilisation, above=0, at_most=1)
        if self.devices is not None:
            check_number("devices", self.devices, whole=True, at_least=1)
        if self.samples is not None:
            check_number("samples", self.samples, above=0)

    def shares_of_peak(self, gpu: str) -> tuple[float, float]:
        """The least and the most that is assumed."""
        if self.utilisation is not None:
            return self.utilisation, self.utilisation
        return MEASURED, GPUS[gpu].utilisation


class Model(NamedTuple):
    """Sizes of a network, in bytes unless stated otherwise."""

    parameters: dict[str, tuple[int, int]]  # by part: total and trained numbers
    weights: int
    trained: int
    in_blocks: int  # weights that sharding gathers block by block, see `coca_lit.training.sharding`
    largest_block: int
    width: int  # of the common space


class Recipe(NamedTuple):
    """How a network is trained."""

    batch: int  # pairs per step, on all devices
    devices: int
    contrastive: bool = True
    sharded: bool = False
    averaged: bool = False  # keeps EMA weights
    micro_batch: int | None = None  # pairs that a device sends through the network at a time
    half: bool = True  # matrix products in bf16
    samples: float | None = None  # in the whole training


def measure(net: CoCa, objectives: Sequence[nn.Module] = ()) -> Model:
    """The sizes of a network, which may be on the meta device, and of what is trained beside it."""
    named: dict[str, Iterable[Tensor]] = {
        "image encoder": net.image_encoder.parameters(),
        "pooling": [*net.pooling.parameters(), *net.image_projection.parameters()],
        "text tower": net.text.parameters(),
    }
    if net.decoder is not None:
        vocabulary = net.decoder.vocabulary.weight
        named["decoder"] = [p for p in net.decoder.parameters() if p is not vocabulary]
        if not net.config.tied_embeddings:  # else it is that of the text tower
            named["vocabulary"] = [vocabulary]
    beside = [p for module in objectives for p in module.parameters()]
    named |= {"objectives": beside} if beside else {}
    counts = {}
    for part, tensors in named.items():
        sizes = [(p.numel(), p.requires_grad) for p in tensors]
        counts[part] = (sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained))
    groups = [sum(p.nbytes for module in group for p in module.parameters()) for group in blocks(net)]
    everything = [*net.parameters(), *beside]
    weights = sum(p.nbytes for p in everything)
    trained = sum(p.nbytes for p in everything if p.requires_grad)
    return Model(counts, weights, trained, sum(groups), max(groups, default=0), net.config.embed_dim)


def memory(model: Model, cost: Cost, recipe: Recipe) -> dict[str, float]:
    """Bytes on a device by purpose, without the activations of its samples."""
    share = recipe.devices if recipe.sharded else 1
    found = {
        "weights": model.weights / share,
        "gradients": model.trained / share,
        "AdamW states": 2 * model.trained / share,
        "casts of weights, chunks of the losses": cost.fixed,
    }
    if recipe.sharded:
        found["weights gathered for a step"] = model.weights - model.in_blocks + model.largest_block
    elif recipe.devices > 1:
        found["DDP's buckets"] = model.trained
    if recipe.averaged:
        found["averaged weights"] = model.weights
    if recipe.contrastive:
        found["contrastive loss over the global batch"] = recipe.batch * _per_text(model)
    return found


def _per_text(model: Model) -> int:
    """Bytes that a pair of the global batch takes on every device: its text feature, a column of a tile of logits, and
    the gradients of both.
    """
    return 4 * 2 * (model.width + TILE)


def per_sample(model: Model, cost: Cost, recipe: Recipe, pixels: int) -> tuple[float, float]:
    """Bytes of a sample on its device: while it is in the network, and during the whole step (image and features)."""
    return cost.activations, pixels + (4 * 4 * model.width if recipe.micro_batch else 0)


def largest_batch(memory_gb: float, model: Model, cost: Cost, recipe: Recipe, pixels: int) -> int:
    """Pairs that fit on a device; 0 if not even one, or not even one micro-batch, does. With micro-batches, only one of
    them is in the network at a time, but every device holds the text features of the global batch.
    """
    in_network, always = per_sample(model, cost, recipe, pixels)
    if recipe.contrastive:
        always += recipe.devices * _per_text(model)
    free = USABLE * memory_gb * 1e9 - sum(memory(model, cost, recipe._replace(batch=0)).values())
    if recipe.micro_batch is None:
        return max(int(free / (in_network + always)), 0)
    found = int((free - recipe.micro_batch * in_network) / always)
    return found if found >= recipe.micro_batch else 0


def largest_micro_batch(memory_gb: float, model: Model, cost: Cost, recipe: Recipe, pixels: int) -> int | None:
    """The largest micro-batch with which the recipe's batch fits: a divisor of a device's share of that batch. None if
    not even single pairs fit.
    """
    own = recipe.batch // recipe.devices
    sizes = [n for n in range(own, 0, -1) if own % n == 0]
    fits = (n for n in sizes if largest_batch(memory_gb, model, cost, recipe._replace(micro_batch=n), pixels) >= own)
    return next(fits, None)


def flops(model: Model, cost: Cost, recipe: Recipe) -> float:
    """FLOPs per sample in training: the step, the contrastive logits of the global batch (4 products), and with
    micro-batches a second forward pass of the two towers.
    """
    logits = 4 * 2 * model.width * recipe.batch if recipe.contrastive else 0
    towers = ("image encoder", "pooling", "text tower")
    again = sum(cost.forward[part] for part in towers) if recipe.micro_batch and recipe.contrastive else 0
    return cost.total + logits + again


def samples_per_second(sample_flops: float, gpu: Gpu, utilisation: float, half: bool) -> float:
    """Throughput of one device, if the input pipeline and the network between machines keep up."""
    return utilisation * (gpu.bf16 if half else gpu.tf32) * 1e12 / sample_flops


def seconds_per_step(model: Model, cost: Cost, recipe: Recipe, gpu: Gpu, utilisation: float) -> float:
    """Of one device with its share of the batch, at least the time in which the host launches the operations."""
    own = -(-recipe.batch // recipe.devices)
    computing = own / samples_per_second(flops(model, cost, recipe), gpu, utilisation, recipe.half)
    passes = own / recipe.micro_batch if recipe.micro_batch else 1
    return max(computing, passes * cost.operations * LAUNCH)


# Tables


def print_plan(title: str, model: Model, cost: Cost, recipe: Recipe, settings: Settings, pixels: int) -> None:
    """Prints the tables.

    Args:
        pixels: bytes of an image.
    """
    console = Console()
    console.print(network_table(title, model, cost, recipe))
    console.print(memory_table(model, cost, recipe, pixels))
    console.print(device_table(model, cost, recipe, settings, pixels))
    shares = ", ".join(f"{_range(settings.shares_of_peak(name), '.1%')} on {name}" for name in settings.gpus)
    console.print(
        f"Estimated, not measured: {settings.caption_tokens} tokens per caption, of the peak {shares}, "
        f"{cost.operations:,} operations per step, each of which takes the host {LAUNCH * 1e6:g} µs or more; input and "
        "network keep up. Settings: gpus, utilisation, caption_tokens, devices, samples."
    )
    if not hasattr(os, "sysconf"):  # Windows does not say how much memory there is
        return
    gigabytes = memory_bytes() / 1e9
    fits = largest_batch(gigabytes, model, cost, recipe._replace(devices=1, sharded=False), pixels)
    console.print(
        f"This process may use {gigabytes:,.1f} GB of memory: {fits:,} samples fit a step on the CPU, estimated."
    )


def network_table(title: str, model: Model, cost: Cost, recipe: Recipe) -> Table:
    table = _table(title, "part", "parameters", "trained", "GFLOP forward, estimated")
    for part in dict.fromkeys([*model.parameters, *cost.forward]):
        numbers = model.parameters.get(part)
        shown = [f"{n / 1e6:,.2f} M" for n in numbers] if numbers else ["", ""]
        table.add_row(part, *shown, f"{cost.forward[part] / 1e9:,.2f}" if part in cost.forward else "")
    table.add_section()
    whole = [f"{n / 1e6:,.2f} M" for n in map(sum, zip(*model.parameters.values(), strict=True))]
    table.add_row("total", *whole, f"{sum(cost.forward.values()) / 1e9:,.2f}")
    table.add_row("training step, per sample, estimated", "", "", f"{flops(model, cost, recipe) / 1e9:,.2f}")
    return table


def memory_table(model: Model, cost: Cost, recipe: Recipe, pixels: int) -> Table:
    table = _table("Memory per device, estimated", "what", "size, estimated")
    parts = memory(model, cost, recipe)
    for name, size in parts.items():
        table.add_row(name, f"{size / 1e9:,.2f} GB")
    table.add_section()
    table.add_row("total", f"{sum(parts.values()) / 1e9:,.2f} GB")
    in_network, always = per_sample(model, cost, recipe, pixels)
    table.add_row("activations and input, per sample", f"{(in_network + always) / 1e6:,.1f} MB")
    return table


def device_table(model: Model, cost: Cost, recipe: Recipe, settings: Settings, pixels: int) -> Table:
    own = -(-recipe.batch // recipe.devices)
    table = _table(f"{recipe.devices} devices, {own:,} samples per device and step", "", *settings.gpus)
    gpus = [GPUS[name] for name in settings.gpus]
    # Seconds per step of each GPU, with the least and the most of its peak.
    steps = [
        tuple(seconds_per_step(model, cost, recipe, GPUS[name], share) for share in settings.shares_of_peak(name))
        for name in settings.gpus
    ]
    fits = [largest_batch(gpu.memory, model, cost, recipe, pixels) for gpu in gpus]
    smaller = [largest_micro_batch(gpu.memory, model, cost, recipe, pixels) for gpu in gpus]
    table.add_row("memory", *(f"{gpu.memory:g} GB" for gpu in gpus))
    table.add_row("samples that fit on a device, estimated", *(f"{n:,}" for n in fits))
    table.add_row("the step fits, estimated", *("yes" if n >= own else "no" for n in fits))
    if min(fits) < own:
        table.add_row(
            "trainer.micro_batch_size that fits, estimated", *("none" if n is None else f"{n:,}" for n in smaller)
        )
    table.add_row("samples/s per device, estimated", *(_range((own / s for s in both), ",.0f") for both in steps))
    table.add_row(
        "samples/s in total, estimated", *(_range((recipe.batch / s for s in both), ",.0f") for both in steps)
    )
    table.add_row("seconds per step, estimated", *(_range(both, ",.3f") for both in steps))
    if recipe.samples is None:
        table.caption = "For the total time, set the number of samples in the training: samples=1e6"
        return table
    hours = [[recipe.samples / recipe.batch * step / 3600 for step in both] for both in steps]
    table.add_row(f"{recipe.samples:,.0f} samples, estimated", *(f"{_range(both, ',.1f')} hours" for both in hours))
    table.add_row("device-hours, estimated", *(_range((h * recipe.devices for h in both), ",.0f") for both in hours))
    return table


def _range(values: Iterable[float], shape: str) -> str:
    """Both values, or one if they are printed alike."""
    return " to ".join(dict.fromkeys(format(value, shape) for value in sorted(values)))


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
