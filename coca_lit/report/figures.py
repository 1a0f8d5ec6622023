"""Figures of a report, as PNG."""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from coca_lit.report.run import Curves, Run, differences
from coca_lit.report.tables import score_name, shown

HEADLINES = ("/CIDEr", "_recall@1", "/exact_match", "/top1")


def curves_figure(curves: Curves) -> bytes | None:
    """Losses and headline scores over the steps; None if there is nothing to draw."""
    losses = {name: curve for name, curve in curves.items() if name.endswith("_loss")}
    scores = {name: c for name, c in curves.items() if name.endswith(HEADLINES) and len(c) > 1}
    cider = {name: scores.pop(name) for name in list(scores) if name.endswith("/CIDEr")}  # on a scale of its own
    groups = {title: g for title, g in {"losses": losses, "scores": scores, "CIDEr": cider}.items() if g}
    if not groups:
        return None
    figure = Figure(figsize=(4.2 * len(groups), 3.6), dpi=160, layout="constrained")
    for axes, (title, group) in zip(_axes(figure, len(groups), columns=3), groups.items(), strict=True):
        for name, points in group.items():
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else "")
        axes.set(title=title, xlabel="step", yscale="log" if title == "losses" else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, framealpha=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def comparison_figure(runs: Sequence[Run]) -> bytes | None:
    """Headline scores of the runs: over the swept value if the runs differ in one number alone, else as bars."""
    scores = [s for s in dict.fromkeys(k for run in runs for k in run.results) if s.endswith(HEADLINES)]
    if not scores:
        return None
    swept = swept_value(runs)
    rows = -(-len(scores) // 3)
    figure = Figure(figsize=(11, 3.2 * rows), dpi=160, layout="constrained")
    for axes, score in zip(_axes(figure, len(scores), columns=3), scores, strict=True):
        values = [shown(score, run.results.get(score, float("nan"))) for run in runs]
        if swept:
            key, numbers = swept
            points = sorted(zip(numbers, values, strict=True))
            axes.plot(*zip(*points, strict=True), marker="o")
            axes.set(xlabel=key, xscale="log" if min(numbers) > 0 and max(numbers) >= 10 * min(numbers) else "linear")
        else:
            axes.barh([run.name for run in runs], values)
            axes.invert_yaxis()
        axes.set_title(f"{score.rpartition('/')[0]} {score_name(score)}", fontsize=10)
        axes.grid(alpha=0.3)
    return _png(figure)


def swept_value(runs: Sequence[Run]) -> tuple[str, list[float]] | None:
    """The only config key in which the runs differ, if it holds a number in each of them."""
    changed = differences(runs)
    if len(changed) != 1:
        return None
    (key, values), *_ = changed.items()
    numbers = [_number(value) for value in values]
    return (key, [n for n in numbers if n is not None]) if None not in numbers else None


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)  # YAML reads 1e-3 as a text
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
