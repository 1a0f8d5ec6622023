"""A plan as tables in the terminal."""

import os
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from coca_lit.machine import memory_bytes
from coca_lit.tools.plan.estimate import (
    GPUS,
    LAUNCH,
    Model,
    Recipe,
    Settings,
    flops,
    largest_batch,
    largest_micro_batch,
    memory,
    per_sample,
    seconds_per_step,
)
from coca_lit.tools.plan.trace import Cost


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
