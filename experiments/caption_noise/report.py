"""Tables and figure of caption_noise: how far caption scores scatter, and which differences are seen."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from coca_lit.runs.scores import NAMES
from experiments.study import Row, read_rows, with_about

RESULTS = Path(__file__).with_name("results.csv")
SCORES = {score: NAMES.get(score, score) for score in ("Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE")}
TABLED = {score: title for score, title in SCORES.items() if score != "ROUGE_L"}
NOT_TABLED = ("plain tokens", "8 beams", "seed 1")  # differences that are noise; the figure has them

MARKS = tuple(zip(SCORES, "osD^v", (-0.2, -0.1, 0.0, 0.1, 0.2), strict=True))  # score, marker, place within the line
COLOURS = dict(zip(SCORES, ("tab:blue", "tab:green", "tab:purple", "tab:red", "tab:orange"), strict=True))

Line = tuple[tuple[str, ...], list[Row]]  # the cells that name it, and a row for each score


def tables() -> dict[str, str]:
    rows = read_rows(RESULTS)
    if not rows:
        return {}
    photos = [row for row in rows if row["data"].startswith("COCO")]  # the CSV has the scenes, too
    scores = lines([row for row in photos if not row["against"] and row["low"]], "data", "captions", "images")
    parts = lines([row for row in photos if not row["low"]], "data", "captions", "images")
    compared = [row for row in rows if row["against"] and row["captions"] not in NOT_TABLED]
    differences = lines(compared, "data", "captions", "against", "images")
    found = cells(scores, lambda own: pair(value(own[0]), half_width(own[0])))
    found += cells(parts, of_parts)
    return {
        "caption_noise": table(["data", "captions", "images"], found, rows),
        "caption_noise/differences": table(
            ["data", "captions", "minus", "images"], cells(differences, difference), rows
        ),
    }


def table(names: Sequence[str], body: Sequence[Sequence[str]], rows: Sequence[Row]) -> str:
    """Markdown of the lines, without scores that no line has."""
    header = [*names, *TABLED.values()]
    kept = [i for i in range(len(header)) if any(line[i] for line in body)]
    lines = [[line[i] for i in kept] for line in body]
    return with_about([header[i] for i in kept], lines, rows)


def lines(rows: Sequence[Row], *named_by: str) -> list[Line]:
    """The rows of one table, grouped by what names a line, in the order of their first rows."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in named_by), []).append(row)
    return list(groups.items())


def cells(found: Sequence[Line], shown: Callable[[Sequence[Row]], str]) -> list[list[str]]:
    """A line of cells for each: its names, then what is shown of the rows of each score."""
    return [
        [*names, *(shown(own) if (own := [row for row in rows if row["score"] == score]) else "" for score in TABLED)]
        for names, rows in found
    ]


def of_parts(own: Sequence[Row]) -> str:
    """Mean over disjoint sets of images, or over seeds, ± 1.96 of their standard deviations."""
    values = [value(row) for row in own]
    return pair(statistics.mean(values), 1.96 * statistics.stdev(values))


def difference(own: Sequence[Row]) -> str:
    (row,) = own
    return pair(value(row), half_width(row)) + (" (noise)" if float(row["p"]) >= 0.05 else "")


def pair(center: float, half: float) -> str:
    return f"{round(center, 2) + 0:.2f} ± {half:.2f}"  # + 0: no negative zero


def value(row: Mapping[str, str]) -> float:
    return 100 * float(row["value"])


def half_width(row: Mapping[str, str]) -> float:
    """Of the interval; 95 %."""
    return 50 * (float(row["high"]) - float(row["low"]))


def draw() -> None:
    """Each difference in half-widths of its interval: whatever lies within one is noise."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows = [row for row in read_rows(RESULTS) if row["against"]]
    compared = lines(rows, "data", "captions", "against", "images")
    figure, axes = plt.subplots(figsize=(9, 1 + 0.7 * len(compared)), layout="constrained")
    names = []
    for place, ((data, captions, against, images), own) in enumerate(compared):
        names.append(f"{captions} minus {against}\n{data}, {int(images):,} images")
        for row, marker, shift in ((r, m, s) for r in own for n, m, s in MARKS if r["score"] == n):
            ratio = value(row) / max(half_width(row), 1e-9)
            axes.plot(ratio, place + shift, marker, color=COLOURS[row["score"]], markersize=6)
    axes.axvspan(-1, 1, color="0.85", zorder=0)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("difference, in half-widths of its 95 % interval (grey: noise)")
    axes.grid(axis="x", alpha=0.3)
    handles = [
        plt.Line2D([], [], marker=m, ls="", color=COLOURS[n], label=SCORES[n])
        for n, m, _ in MARKS
        if any(row["score"] == n for row in rows)
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    figure.savefig(RESULTS.with_name("caption_noise.png"), dpi=110)
    plt.close(figure)
