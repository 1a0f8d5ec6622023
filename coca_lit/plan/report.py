"""A plan as tables on the screen."""

from rich.console import Console
from rich.table import Table

from coca_lit.plan.estimate import (
    Model,
    Recipe,
    flops,
    largest_batch,
    largest_micro_batch,
    memory,
    per_sample,
    samples_per_second,
    total_parameters,
)
from coca_lit.plan.hardware import GPUS
from coca_lit.plan.settings import Settings
from coca_lit.plan.trace import Cost


def print_plan(
    title: str,
    model: Model,
    cost: Cost,
    recipe: Recipe,
    settings: Settings,
    pixels: int,
    console: Console | None = None,
) -> None:
    """
    Args:
        pixels: bytes of an image.
    """
    console = console or Console()
    console.print(network_table(title, model, cost, recipe))
    console.print(memory_table(model, cost, recipe, pixels))
    console.print(device_table(model, cost, recipe, settings, pixels))
    console.print(
        f"Arithmetic, not a measurement: {settings.caption_tokens} tokens per caption, {settings.utilisation:.0%} of "
        "the peak, input and network that keep up. Other values: "
        "utilisation=0.3 caption_tokens=30 devices=64"
    )


def network_table(title: str, model: Model, cost: Cost, recipe: Recipe) -> Table:
    table = _table(title, "part", "parameters", "trained", "GFLOP forward")
    for part in dict.fromkeys([*model.parameters, *cost.forward]):
        numbers = model.parameters.get(part)
        shown = [f"{n / 1e6:,.2f} M" for n in numbers] if numbers else ["", ""]
        table.add_row(part, *shown, f"{cost.forward[part] / 1e9:,.2f}" if part in cost.forward else "")
    table.add_section()
    whole = [f"{n / 1e6:,.2f} M" for n in total_parameters(model.parameters)]
    table.add_row("all", *whole, f"{sum(cost.forward.values()) / 1e9:,.2f}")
    table.add_row("training step, per sample", "", "", f"{flops(model, cost, recipe) / 1e9:,.2f}")
    return table


def memory_table(model: Model, cost: Cost, recipe: Recipe, pixels: int) -> Table:
    table = _table("Memory of a device", "what", "size")
    parts = memory(model, cost, recipe)
    for name, size in parts.items():
        table.add_row(name, f"{size / 1e9:,.2f} GB")
    table.add_section()
    table.add_row("all of these", f"{sum(parts.values()) / 1e9:,.2f} GB")
    in_network, always = per_sample(model, cost, recipe, pixels)
    table.add_row("activations and input of a sample", f"{(in_network + always) / 1e6:,.1f} MB")
    return table


def device_table(model: Model, cost: Cost, recipe: Recipe, settings: Settings, pixels: int) -> Table:
    own = -(-recipe.batch // recipe.devices)
    table = _table(f"{recipe.devices} devices, {own:,} samples each in a step", "", *settings.gpus)
    work = flops(model, cost, recipe)
    rates = [samples_per_second(work, GPUS[name], settings.utilisation, recipe.half) for name in settings.gpus]
    fits = [largest_batch(GPUS[name].memory, model, cost, recipe, pixels) for name in settings.gpus]
    smaller = [largest_micro_batch(GPUS[name].memory, model, cost, recipe, pixels) for name in settings.gpus]
    table.add_row("memory", *(f"{GPUS[name].memory:g} GB" for name in settings.gpus))
    table.add_row("samples that fit a device", *(f"{n:,}" for n in fits))
    table.add_row("the step fits", *("yes" if n >= own else "no" for n in fits))
    if min(fits) < own:
        table.add_row("trainer.micro_batch_size that fits", *("none" if n is None else f"{n:,}" for n in smaller))
    table.add_row("samples/s of a device", *(f"{rate:,.0f}" for rate in rates))
    table.add_row("samples/s of all", *(f"{rate * recipe.devices:,.0f}" for rate in rates))
    table.add_row("seconds of a step", *(f"{recipe.batch / rate / recipe.devices:,.3f}" for rate in rates))
    if recipe.samples is None:
        table.caption = "For times, set how many samples the training has: samples=1e6"
        return table
    hours = [recipe.samples / rate / 3600 for rate in rates]
    table.add_row(f"{recipe.samples:,.0f} samples", *(f"{h / recipe.devices:,.1f} hours" for h in hours))
    table.add_row("device-hours", *(f"{h:,.0f}" for h in hours))
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
