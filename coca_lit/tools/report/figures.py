"""Figures of a report, as PNG."""

import io
import math
import re
from collections.abc import Collection, Iterable, Sequence
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from coca_lit.reading import printable
from coca_lit.runs.scores import HEADLINES, RERANKED, data_name, headlines_of, in_print_units, score_name
from coca_lit.tools.report.runs import EVALUATED, Curves, Run, differences, same_data
from coca_lit.tools.report.tables import published_scores, run_names

LINES, PANELS = 24, 9  # in a panel; panels in a figure
PANEL, ENTRY = (4.4, 3.4), 0.22  # inches: of a panel, about as wide as a phone; more for each line of its legend
STAGES = {"train": "training", "val": "validation"}
MANY = 8  # runs, of which more bars are hard to read
GAP, SEVERAL = "/top1", 4  # the score whose gaps are drawn, if two runs share at least that many data sets


def curves_figures(curves: Curves) -> dict[str, bytes]:
    """Losses and headline scores over the steps, title -> PNG; nothing to draw, no figure.

    The score of all images at the end is a star, joined to the curve of the first few images by a dashed line.
    """
    losses = {name: curve for name, curve in curves.items() if name.endswith("_loss")}
    scores = {n: curve for n, curve in curves.items() if n.endswith(HEADLINES) and f"/{RERANKED}" not in n}
    scores = dict(sorted(scores.items(), key=lambda item: len(item[1]) == 1))  # the final ones behind their curves
    with_curves = {_on_all(name, scores) for name, curve in scores.items() if len(curve) > 1}
    scores = {name: curve for name, curve in scores.items() if len(curve) > 1 or name in with_curves}
    cider = {name: scores.pop(name) for name in list(scores) if name.endswith("/CIDEr")}  # on a scale of its own
    groups = {"losses": losses, "scores, %": scores, "CIDEr": cider}
    return {title: _panel(title, group) for title, group in groups.items() if group}


def curves_of_runs(runs: Sequence[Run]) -> dict[str, bytes]:
    """Losses and headline scores that several runs have curves of, title -> PNG with a line for each run. None of
    scores on different images, or of more runs than a legend holds.
    """
    if len(runs) > MANY:
        return {}
    names = dict.fromkeys(name for run in runs for name in run.curves if name.endswith(("_loss", *HEADLINES)))
    panels: dict[str, bytes] = {}
    known = {score for run in runs for score in run.results}
    for name in names:
        labelled = zip(runs, run_names(runs), strict=True)
        drawn = [(run.curves[name], label) for run, label in labelled if len(run.curves.get(name, ())) > 1]
        if len(drawn) < 2 or len(panels) == PANELS or f"/{RERANKED}" in name:
            continue
        loss = name.endswith("_loss")
        if not loss and not same_data(runs, _on_all(name, known)):
            continue
        figure = Figure(figsize=(PANEL[0], PANEL[1] + ENTRY * len(drawn)), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        for points, label in drawn:
            steps, raw = zip(*points, strict=True)
            values = _finite(raw if loss else (in_print_units(name, value) for value in raw))
            axes.plot(steps, values, label=_text(label), marker="" if len(steps) >= 30 else ".")
        title = _curve_name(name, known)
        _finish(axes, title, logarithmic=loss)
        panels[title] = png_of(figure)
    return panels


def _finish(axes: Axes, title: str, logarithmic: bool) -> None:
    low, high = axes.dataLim.intervaly
    wide = logarithmic and 0 < 3 * low < high  # the ticks of a narrow logarithmic axis are hard to read
    axes.set(title=title, xlabel="optimizer steps", yscale="log" if wide else "linear")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    axes.spines[["top", "right"]].set_visible(False)


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


def _panel(title: str, group: Curves) -> bytes:
    entries = len({_on_all(name, group) for name in group})
    figure = Figure(figsize=(PANEL[0], PANEL[1] + ENTRY * min(entries, LINES)), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    colours: dict[str, str] = {}  # shared by a score on all images and on a subset
    ends: dict[str, tuple[int, float]] = {}  # of the curves of subsets
    for name, points in list(group.items())[:LINES]:
        of_all = _on_all(name, group)
        label = None if of_all in colours else _curve_name(name, group)
        colour = colours.setdefault(of_all, f"C{len(colours)}")
        steps, raw = zip(*points, strict=True)
        values = _finite(raw if title == "losses" else (in_print_units(name, value) for value in raw))
        final = len(values) == 1 and title != "losses"
        if final and name in ends:
            join = zip(ends[name], (steps[0], values[0]), strict=True)
            axes.plot(*join, color=colour, linestyle="--", linewidth=1)
        ends.setdefault(of_all, (steps[-1], values[-1]))
        marker = "*" if final else "" if len(points) >= 30 else "."
        axes.plot(steps, values, label=label, color=colour, marker=marker, markersize=11 if final else None)
    _finish(axes, title, logarithmic=title == "losses")
    return png_of(figure)


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


def comparison_figure(runs: Sequence[Run], objective: str | None = None) -> bytes | None:
    """Headline scores of the runs: over the swept value if the runs differ in one number alone, else as bars; of many
    runs that differ in several numbers, the objective over each of them.
    """
    several = swept_numbers(runs)
    swept = swept_value(runs)
    drawn = gaps(runs)  # in a figure of their own
    results = dict.fromkeys(score for run in runs for score in run.results if score not in drawn)
    several_have = [score for score in results if sum(score in run.results for run in runs) > 1]
    shown = [score for score in several_have if same_data(runs, score)]
    panels: list[tuple[str, str | None]] = [(score, swept and swept[0]) for score in headlines_of(shown, PANELS)]
    many = len(runs) >= MANY or EVALUATED in differences(runs)
    scattered = objective in shown and many and len(several) > 1
    if objective is not None and scattered:
        panels = [(objective, key) for key in list(several)[:PANELS]]
    if not panels:
        return None
    figure = Figure(figsize=(11, 3.2 * -(-len(panels) // 3)), dpi=160, layout="constrained")
    columns = min(3, len(panels))
    for place, (score, key) in enumerate(panels, start=1):
        axes = figure.add_subplot(-(-len(panels) // columns), columns, place)
        values = _finite(in_print_units(score, run.results.get(score, math.nan)) for run in runs)
        known, sources = published_scores(runs, score)
        published = [in_print_units(score, value) for value in known]
        marks: dict[str, Any] = {"marker": "D", "facecolors": "none", "edgecolors": "black", "zorder": 3}
        if key is None:
            axes.barh(range(len(runs)), values, tick_label=[_text(name) for name in run_names(runs)])
            axes.scatter(published, range(len(runs)), **marks, label="published")
            axes.set_xlim(min([0, *values]), None if any(abs(value) > 0 for value in [*values, *published]) else 1)
            axes.invert_yaxis()
        else:
            points = sorted(zip(several[key], values, strict=True))
            axes.plot(*zip(*points, strict=True), marker="o", linestyle="" if scattered else "-")
            axes.scatter(several[key], published, **marks, label="published")
            wide = min(several[key]) > 0 and max(several[key]) >= 10 * min(several[key])
            axes.set(xlabel=_text(key), xscale="log" if wide else "linear")
        if sources:
            axes.legend(fontsize=8)
        axes.set_title(
            f"{_text(data_name(score.rpartition('/')[0]))}\n{fill(_text(score_name(score)), 20)}", fontsize=10
        )
        axes.grid(alpha=0.3)
    return png_of(figure)


def gaps(runs: Sequence[Run]) -> dict[str, float]:
    """By how many points the zero-shot accuracy of the second of two runs is above that of the first, for each score of
    that kind, the largest first. Empty for another number of runs, or fewer than `SEVERAL` data sets in common.
    """
    if len(runs) != 2:
        return {}
    first, second = (run.results for run in runs)
    # Neither probes nor the decoder.
    zero_shot = [score for score in first if score.endswith(GAP) and score.count("/") == 1 and score in second]
    zero_shot = [score for score in zero_shot if same_data(runs, score)]
    found = {score: 100 * (second[score] - first[score]) for score in zero_shot}
    found = {score: gap for score, gap in found.items() if math.isfinite(gap)}
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
        f"{_text(score.removesuffix(GAP))}  {100 * first.results[score]:.1f} → {100 * second.results[score]:.1f}"
        for score in found
    ]
    colours = ["C0" if gap >= 0 else "C3" for gap in found.values()]
    bars = axes.barh(names, list(found.values()), color=colours)
    axes.bar_label(bars, fmt="%+.1f", padding=3, fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    mean = sum(found.values()) / len(found)
    axes.set_title(f"{_text(second.name)} against {_text(first.name)}: {mean:+.1f} points on average", fontsize=11)
    axes.set(xlabel="difference of zero-shot top-1, points", ylim=(len(found) - 0.4, -0.6))
    axes.margins(x=0.12)
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return png_of(figure)


def swept_numbers(runs: Sequence[Run]) -> dict[str, list[float]]:
    """The config keys in which the runs differ, if every run has a number for each of them; else nothing. In place of
    the names of checkpoints, the `model_numbers` of all of them.
    """
    found = differences(runs)
    numbers = {key: [_number(value) for value in values] for key, values in found.items() if key != EVALUATED}
    if EVALUATED in found:
        models = [model_numbers(run, str(name)) for run, name in zip(runs, found[EVALUATED], strict=True)]
        rows = {key: [model.get(key, math.nan) for model in models] for key in models[0]}
        numbers |= {key: row for key, row in rows.items() if not any(map(math.isnan, row)) and len(set(row)) > 1}
    return {} if any(math.isnan(n) for row in numbers.values() for n in row) else numbers


def model_numbers(run: Run, checkpoint: str) -> dict[str, float]:
    """What is known of the size and the training of a model: from its evaluation, and from its name as LAION writes it,
    "…_s12.8B_…/epoch_3".
    """
    found: dict[str, float] = {}
    match = re.search(r"(?<=[_-])s(\d+(?:\.\d+)?)([mb])(?=[_-])", checkpoint, re.IGNORECASE)
    if match:
        found["samples of the whole training"] = float(match[1]) * (1e6 if match[2] in "mM" else 1e9)
    match = re.search(r"epoch_(\d+)(?:\.pt)?$", checkpoint)
    if match:
        found["epoch"] = float(match[1])
    sizes = run.environment.get("parameters")
    if sizes:
        found["parameters"] = float(sum(sizes.values()))
    gflops = run.environment.get("gflops")
    if gflops:
        found["GFLOP per pair"] = float(gflops)
    return found


def swept_value(runs: Sequence[Run]) -> tuple[str, list[float]] | None:
    """The only config key in which the runs differ, if it holds a number in each of them. Not the seed: a curve over
    seeds means nothing.
    """
    swept = swept_numbers(runs)
    return next(iter(swept.items())) if len(swept) == 1 and "seed" not in swept else None


def _number(value: Any) -> float:
    """NaN if it is none, or infinite; YAML reads 1e-3 as a text."""
    try:
        return math.nan if isinstance(value, bool) else _finite([float(value)])[0]
    except (TypeError, ValueError):
        return math.nan


def _finite(values: Iterable[float]) -> list[float]:
    """The values with NaN, which is not drawn, in place of infinite ones."""
    return [value if math.isfinite(value) else math.nan for value in values]


def _text(text: str) -> str:
    """A name from anywhere as a label: no control characters, and no formulas."""
    return printable(text).replace("$", r"\$")


def png_of(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
