"""Figures of a report, as PNG."""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from coca_lit.report.runs import Curves, Run, differences
from coca_lit.report.scores import HEADLINES, RERANKED, data_name, headlines_of, in_print_units, score_name
from coca_lit.report.tables import run_names

MANY, PANELS = 8, 9  # runs, of which more bars are hard to read; scores in a figure
GAP, SEVERAL = "/top1", 4  # the score whose gaps are drawn, if two runs share at least that many data sets


def curves_figure(curves: Curves) -> bytes | None:
    """Losses and headline scores over the steps; None if there is nothing to draw.

    The score of all images at the end is a star, joined to the curve of the first few images by a dashed line.
    """
    losses = {name: curve for name, curve in curves.items() if name.endswith("_loss")}
    scores = {n: curve for n, curve in curves.items() if n.endswith(HEADLINES) and f"/{RERANKED}" not in n}
    scores = dict(sorted(scores.items(), key=lambda item: len(item[1]) == 1))  # the final ones behind their curves
    scores = {name: curve for name, curve in scores.items() if len(curve) > 1 or _has_curve(name, scores)}
    cider = {name: scores.pop(name) for name in list(scores) if name.endswith("/CIDEr")}  # on a scale of its own
    groups = {title: g for title, g in {"losses": losses, "scores, %": scores, "CIDEr": cider}.items() if g}
    if not groups:
        return None
    figure = Figure(figsize=(4.4 * len(groups), 4.6), dpi=160, layout="constrained")
    for axes, (title, group) in zip(_axes(figure, len(groups), columns=3), groups.items(), strict=True):
        colours: dict[str, str] = {}  # shared by a score on all images and on a subset
        ends: dict[str, tuple[int, float]] = {}  # of the curves of subsets
        for name, points in group.items():
            colour = colours.setdefault(_on_all(name), f"C{len(colours)}")
            if title == "losses":
                axes.plot(*zip(*points, strict=True), label=name, color=colour, marker="" if len(points) >= 30 else ".")
                continue
            values = [(step, in_print_units(name, value)) for step, value in points]
            final = len(values) == 1
            if final and name in ends:
                axes.plot(*zip(ends[name], values[0], strict=True), color=colour, linestyle="--", linewidth=1)
            ends.setdefault(_on_all(name), values[-1])
            marker = "*" if final else "" if len(points) >= 30 else "."
            axes.plot(*zip(*values, strict=True), label=_label(name, final), color=colour, marker=marker)
        axes.set(title=title, xlabel="optimizer steps", yscale="log" if title == "losses" else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14))
        axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _label(score: str, final: bool) -> str:
    """scenes_256/CIDEr -> "built-in scenes CIDEr, first 256 images"."""
    few = None if final else re.search(r"_(\d+)/", score)
    data = data_name(score.rpartition("/")[0] if few is None else score[: few.start()])
    which = ", all images" if final else f", first {few[1]} images" if few is not None else ""
    return f"{data} {score_name(score).removesuffix(', %')}{which}"


def _on_all(score: str) -> str:
    """The name of a score on all images: scenes_256/CIDEr -> scenes/CIDEr."""
    return re.sub(r"_\d+(?=/)", "", score)


def _has_curve(score: str, curves: Curves) -> bool:
    return any(_on_all(name) == score != name and len(curve) > 1 for name, curve in curves.items())


def comparison_figure(runs: Sequence[Run], objective: str | None = None) -> bytes | None:
    """Headline scores of the runs: over the swept value if the runs differ in one number alone, else as bars; of many
    runs that differ in several numbers, the objective over each of them.
    """
    several = swept_numbers(runs)
    if objective is not None and len(runs) >= MANY and len(several) > 1:
        return _scatter_figure(runs, objective, several)
    drawn = gaps(runs)  # in a figure of their own
    scores = headlines_of(
        [score for score in dict.fromkeys(s for run in runs for s in run.results) if score not in drawn], PANELS
    )
    if not scores:
        return None
    swept = swept_value(runs)
    rows = -(-len(scores) // 3)
    figure = Figure(figsize=(11, 3.2 * rows), dpi=160, layout="constrained")
    for axes, score in zip(_axes(figure, len(scores), columns=3), scores, strict=True):
        values = [in_print_units(score, run.results.get(score, float("nan"))) for run in runs]
        if swept:
            key, numbers = swept
            points = sorted(zip(numbers, values, strict=True))
            axes.plot(*zip(*points, strict=True), marker="o")
            axes.set(xlabel=key, xscale=_scale(numbers))
        else:
            axes.barh(run_names(runs), values)
            axes.invert_yaxis()
        axes.set_title(f"{data_name(score.rpartition('/')[0])}\n{score_name(score)}", fontsize=10)
        axes.grid(alpha=0.3)
    return _png(figure)


def gaps(runs: Sequence[Run]) -> dict[str, float]:
    """By how many points the zero-shot accuracy of the second of two runs is above that of the first, for each score of
    that kind, the largest first. Empty for another number of runs, or fewer than `SEVERAL` data sets in common.
    """
    if len(runs) != 2:
        return {}
    first, second = (run.results for run in runs)
    # Neither probes nor the decoder.
    zero_shot = [score for score in first if score.endswith(GAP) and score.count("/") == 1]
    found = {score: 100 * (second[score] - first[score]) for score in zero_shot if score in second}
    found = {score: gap for score, gap in found.items() if not math.isnan(gap)}
    return dict(sorted(found.items(), key=lambda item: -item[1])) if len(found) >= SEVERAL else {}


def gap_figure(runs: Sequence[Run]) -> bytes | None:
    """The sorted `gaps` of two runs as bars with both accuracies beside the names; None if there are none."""
    found = gaps(runs)
    if not found:
        return None
    first, second = runs
    figure = Figure(figsize=(8, 1.2 + 0.27 * len(found)), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    names = [
        f"{score.removesuffix(GAP)}  {100 * first.results[score]:.1f} → {100 * second.results[score]:.1f}"
        for score in found
    ]
    colours = ["C0" if gap >= 0 else "C3" for gap in found.values()]
    bars = axes.barh(names, list(found.values()), color=colours)
    axes.bar_label(bars, fmt="%+.1f", padding=3, fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    mean = sum(found.values()) / len(found)
    axes.set_title(f"{second.name} against {first.name}: {mean:+.1f} points on average", fontsize=11)
    axes.set(xlabel="difference of zero-shot top-1, points", ylim=(len(found) - 0.4, -0.6))
    axes.margins(x=0.12)
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return _png(figure)


def _scatter_figure(runs: Sequence[Run], objective: str, swept: dict[str, list[float]]) -> bytes:
    values = [in_print_units(objective, run.results.get(objective, float("nan"))) for run in runs]
    rows = -(-len(swept) // 3)
    figure = Figure(figsize=(11, 3.2 * rows), layout="constrained")
    for axes, (key, numbers) in zip(_axes(figure, len(swept), columns=3), swept.items(), strict=True):
        axes.scatter(numbers, values)
        axes.set(xlabel=key, ylabel=objective, xscale=_scale(numbers))
        axes.grid(alpha=0.3)
    return _png(figure)


def _scale(numbers: Sequence[float]) -> str:
    return "log" if min(numbers) > 0 and max(numbers) >= 10 * min(numbers) else "linear"


def swept_numbers(runs: Sequence[Run]) -> dict[str, list[float]]:
    """The config keys in which the runs differ, if every run has a number for each of them; else nothing."""
    numbers = {key: [_number(value) for value in values] for key, values in differences(runs).items()}
    whole = {key: [n for n in row if n is not None] for key, row in numbers.items()}
    return whole if all(len(row) == len(runs) for row in whole.values()) else {}


def swept_value(runs: Sequence[Run]) -> tuple[str, list[float]] | None:
    """The only config key in which the runs differ, if it holds a number in each of them. Not the seed: a curve over
    seeds means nothing.
    """
    swept = swept_numbers(runs)
    return next(iter(swept.items())) if len(swept) == 1 and "seed" not in swept else None


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)  # YAML reads 1e-3 as a string
    except (TypeError, ValueError):
        return None


def _axes(figure: Figure, count: int, columns: int) -> list[Axes]:
    columns = min(columns, count)
    rows = -(-count // columns)
    return [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
