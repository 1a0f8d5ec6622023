"""Figures of a report, as PNG."""

import io
import math
import re
from collections.abc import Collection, Mapping, Sequence
from textwrap import fill
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from coca_lit.reading import printable
from coca_lit.runs.scores import HEADLINES, RERANKED, data_name, headlines_of, in_print_units, score_name
from coca_lit.tools.report.runs import Curves, Points, Run, differences, same_data
from coca_lit.tools.report.tables import run_names

LINES, PANELS = 24, 9  # in a panel; panels in a figure
PANEL, ENTRY = (4.4, 3.4), 0.22  # inches: of a panel, about as wide as a phone; more for each line of its legend
STAGES = {"train": "training", "val": "validation"}
MANY = 8  # runs, of which more lines are hard to tell apart


class Line(NamedTuple):
    """A line of a panel, and if it is of the first few images: the step and score of all images at the end."""

    points: Points
    end: tuple[int, float] | None = None


def curves_figures(curves: Curves) -> dict[str, bytes]:
    """Losses and headline scores over the steps, title -> PNG; nothing to draw, no figure."""
    groups: dict[str, dict[str, Line]] = {"losses": {}, "scores, %": {}, "CIDEr": {}}  # each on a scale of its own
    for name, points in _drawn(curves).items():
        title = "losses" if name.endswith("_loss") else "CIDEr" if name.endswith("/CIDEr") else "scores, %"
        whole = _on_all(name, curves)
        end = _printed(whole, curves[whole])[-1] if whole != name else None
        if len(points) > 1:
            groups[title][_curve_name(name, curves)] = Line(_printed(name, points), end)
    return {title: _panel(title, lines) for title, lines in groups.items() if lines}


def curves_of_runs(runs: Sequence[Run]) -> dict[str, bytes]:
    """Losses and headline scores that several runs have curves of, title -> PNG with a line for each run. None of
    scores on different images, or of more runs than a legend holds.
    """
    panels: dict[str, bytes] = {}
    known = {score for run in runs for score in run.results}
    names = dict.fromkeys(name for run in runs for name in _drawn(run.curves))
    for name in names if len(runs) <= MANY else ():
        lines: dict[str, Line] = {}
        for label, run in zip(run_names(runs), runs, strict=True):
            if len(run.curves.get(name, ())) > 1:
                lines[_text(label)] = Line(_printed(name, run.curves[name]))
        same = name.endswith("_loss") or same_data(runs, _on_all(name, known))
        if len(lines) > 1 and same and len(panels) < PANELS:
            title = _curve_name(name, known)
            panels[title] = _panel(title, lines)
    return panels


def _drawn(curves: Curves) -> Curves:
    return {
        name: c for name, c in curves.items() if name.endswith(("_loss", *HEADLINES)) and f"/{RERANKED}" not in name
    }


def _printed(name: str, points: Points) -> Points:
    """In the units of papers, and finite: a NaN is not drawn."""
    values = [(step, in_print_units(name, value)) for step, value in points]
    return [(step, value if math.isfinite(value) else math.nan) for step, value in values]


def _panel(title: str, lines: Mapping[str, Line]) -> bytes:
    """The end of a line of few images is a star, joined by a dashed line."""
    shown = dict(list(lines.items())[:LINES])
    figure = Figure(figsize=(PANEL[0], PANEL[1] + ENTRY * len(shown)), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for i, (label, line) in enumerate(shown.items()):
        marker = "" if len(line.points) >= 30 else "."
        axes.plot(*zip(*line.points, strict=True), label=label, color=f"C{i}", marker=marker)
        if line.end is not None:
            axes.plot(*zip(line.points[-1], line.end, strict=True), color=f"C{i}", linestyle="--", linewidth=1)
            axes.plot(*line.end, color=f"C{i}", marker="*", markersize=11)
    low, high = axes.dataLim.intervaly
    wide = "loss" in title and 0 < 3 * low < high  # the ticks of a narrow logarithmic axis are hard to read
    axes.set(title=title, xlabel="optimizer steps", yscale="log" if wide else "linear")
    axes.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return _finished(figure, axes)


def _finished(figure: Figure, axes: Axes) -> bytes:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return png_of(figure)


def side_by_side(panels: Sequence[bytes]) -> bytes:
    """PNGs as one."""
    images = [Image.open(io.BytesIO(panel)) for panel in panels]
    sheet = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _curve_name(name: str, known: Collection[str]) -> str:
    """scenes_256/CIDEr -> "built-in scenes, CIDEr"; train/caption_loss -> "caption loss, training"."""
    group, _, short = _on_all(name, known).rpartition("/")
    if short.endswith("_loss"):
        return _text(f"{short.replace('_', ' ')}, {STAGES.get(group, group)}")
    return _text(f"{data_name(group)}, {score_name(short).removesuffix(', %')}")


def _on_all(score: str, known: Collection[str]) -> str:
    """The name of a score on all images: scenes_256/CIDEr -> scenes/CIDEr, if that is `known`."""
    whole = re.sub(r"_\d+(?=/)", "", score)
    return whole if whole in known else score


def comparison_figure(runs: Sequence[Run]) -> bytes | None:
    """Headline scores of the same images: of two runs their differences, of more runs the scores over the swept value,
    or else as bars. None if there are no such scores.
    """
    results = dict.fromkeys(score for run in runs for score in run.results)
    shared = [score for score in results if sum(score in run.results for run in runs) > 1 and same_data(runs, score)]
    if len(runs) == 2:
        return _differences_figure(runs[0], runs[1], headlines_of(shared, len(shared)))
    scores = headlines_of(shared, PANELS)
    if not scores:
        return None
    key, swept = swept_value(runs) or ("", [])
    columns = min(3, len(scores))
    rows = math.ceil(len(scores) / columns)
    figure = Figure(figsize=(11, 3.2 * rows), dpi=160, layout="constrained")
    for place, score in enumerate(scores, start=1):
        axes = figure.add_subplot(rows, columns, place)
        values = [value for _, value in _printed(score, [(0, run.results.get(score, math.nan)) for run in runs])]
        if swept:
            axes.plot(*zip(*sorted(zip(swept, values, strict=True)), strict=True), marker="o")
            wide = min(swept) > 0 and max(swept) >= 10 * min(swept)
            axes.set(xlabel=_text(key), xscale="log" if wide else "linear")
        else:
            axes.barh(range(len(runs)), values, tick_label=[_text(name) for name in run_names(runs)])
            axes.set_xlim(min([0, *values]), None if any(abs(value) > 0 for value in values) else 1)
            axes.invert_yaxis()
        name = fill(_text(score_name(score)), 20)
        axes.set_title(f"{_text(data_name(score.rpartition('/')[0]))}\n{name}", fontsize=10)
        axes.grid(alpha=0.3)
    return png_of(figure)


def _differences_figure(first: Run, second: Run, scores: Sequence[str]) -> bytes | None:
    """Bars of how far the second run is above the first, the largest first, with both scores beside the names."""
    gaps: dict[str, float] = {}
    for score in scores:
        gap = in_print_units(score, second.results[score] - first.results[score])
        if math.isfinite(gap):
            name = f"{data_name(score.rpartition('/')[0])} {score_name(score)}"
            gaps[f"{_text(name)}  {first.cell(score)} → {second.cell(score)}"] = gap
    if not gaps:
        return None
    gaps = dict(sorted(gaps.items(), key=lambda item: -item[1]))
    figure = Figure(figsize=(9, 1.2 + 0.27 * len(gaps)), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(list(gaps), list(gaps.values()), color=["C0" if gap >= 0 else "C3" for gap in gaps.values()])
    axes.bar_label(bars, fmt="%+.1f", padding=3, fontsize=8)
    axes.set_title(f"{_text(second.name)} against {_text(first.name)}", fontsize=11)
    axes.set(xlabel="difference", ylim=(len(gaps) - 0.4, -0.6))
    axes.margins(x=0.12)
    axes.tick_params(axis="y", labelsize=8)
    return _finished(figure, axes)


def swept_value(runs: Sequence[Run]) -> tuple[str, list[float]] | None:
    """The only config key in which the runs differ, if it holds a number in each of them. Not the seed: a curve over
    seeds means nothing.
    """
    varied = differences(runs)
    for key, values in varied.items():
        numbers = [_number(value) for value in values]
        if len(varied) == 1 and key != "seed" and all(map(math.isfinite, numbers)):
            return key, numbers
    return None


def _number(value: Any) -> float:
    """NaN if it is none; YAML reads 1e-3 as a text."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _text(text: str) -> str:
    """A name from anywhere as a label: no control characters, and no formulas."""
    return printable(text).replace("$", r"\$")


def png_of(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
