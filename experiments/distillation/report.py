"""Table and figure of distillation on scenes: scores of each way of training against the samples that it saw."""

import re
from pathlib import Path
from statistics import fmean

from experiments.study import by_variant, draw_lines, numbers, read_rows, renamed, unit, variants

RESULTS = Path(__file__).with_name("results.csv")
WAYS = {
    "plain": "pairs alone",
    "captions": "synthetic captions",
    "distilled": "two teachers",
    "reinforced": "teachers and synthetic captions",
}
SAMPLES = (3840, 7680, 15360)
NAMES = {f"{way}_{samples}": f"{name}, {samples:,}" for way, name in WAYS.items() for samples in SAMPLES}
SCORES = {
    "scenes/CIDEr": "CIDEr",
    "scenes/t2i_recall@1": "text to image R@1",
    "scenes/i2t_recall@1": "image to text R@1",
}


def tables() -> dict[str, str]:
    names = {name: title for name, title in NAMES.items() if not name.endswith(f"_{SAMPLES[1]}")}  # the figure has all
    rows = renamed(read_rows(RESULTS), names | {"teacher": "teacher"})
    return {"distillation": by_variant(rows, SCORES)} if rows else {}


def draw() -> None:
    """The mean over the seeds against the samples, a line for each way."""
    groups = {name: rows for name, rows in variants(read_rows(RESULTS)).items() if name in NAMES}
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for score, title in SCORES.items():
        lines = panels.setdefault(unit(score, title), {})
        for name, rows in sorted(groups.items(), key=lambda group: int(re.sub(r"\D", "", group[0]))):
            lines.setdefault(WAYS[name.partition("_")[0]], []).append(
                (float(name.partition("_")[2]), fmean(numbers(rows, score)))
            )
    draw_lines(panels, "samples", "", RESULTS.with_name("distillation.png"))
