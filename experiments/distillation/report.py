"""Table and figure of distillation: scores of each way of training against the samples that it saw."""

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
PHOTO_NAMES = {
    f"photos_{way}_{samples}": f"{name}, {samples:,}"
    for way, name in {"plain": "pairs alone", "distilled": "teachers"}.items()
    for samples in (6000, 30000)
}
SCORES = {
    "scenes/CIDEr": "CIDEr",
    "scenes/t2i_recall@1": "text to image R@1",
    "scenes/i2t_recall@1": "image to text R@1",
}
PHOTO_SCORES = {score.replace("scenes", "flickr8k"): title for score, title in SCORES.items()}


def tables() -> dict[str, str]:
    rows = read_rows(RESULTS)
    found = {
        "distillation": (renamed(rows, NAMES | {"teacher": "teacher"}), SCORES),
        "distillation/photos": (renamed(rows, PHOTO_NAMES), PHOTO_SCORES),
    }
    return {name: by_variant(chosen, scores) for name, (chosen, scores) in found.items() if chosen}


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
