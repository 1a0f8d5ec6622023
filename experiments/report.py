"""Tables and figure of a study, from its CSV.

    python experiments/report.py STUDY [RUN_FOLDERS…]

Run folders are added to the study's results.csv first, in place of rows with the same name. A study is listed below, or
has a `report.py` of its own with `tables() -> {name: Markdown}` and, if it has a figure, `draw()`.
"""

import argparse
import importlib
from pathlib import Path
from typing import Any

from experiments.study import (
    EXPERIMENTS,
    TableStudy,
    VariantStudy,
    add_runs,
    as_they_are,
    by_seed,
    read_rows,
    write_rows,
    write_tables,
)

SCENE_SCORES = {
    "scenes/CIDEr": "CIDEr",
    "scenes/exact_match": "exact match",
    "scenes/t2i_recall@1": "text to image R@1",
    "scenes/i2t_recall@1": "image to text R@1",
}


def results(name: str) -> Path:
    return EXPERIMENTS / name / "results.csv"


STUDIES: dict[str, Any] = {
    "demo": TableStudy(results("demo"), by_seed),
    "faults": TableStudy(results("faults"), as_they_are),
    "flickr8k": TableStudy(results("flickr8k"), by_seed),
    "generation_equality": TableStudy(results("generation_equality"), by_seed),
    "image_decoder": VariantStudy(
        results("image_decoder"),
        {"none": "no image decoder", "weight1": "weight 1", "weight10": "weight 10"},
        SCENE_SCORES,
        borrowed={"none": ("poolers", "single")},
    ),
    "loss_weights": VariantStudy(
        results("loss_weights"),
        {"1to0": "1 : 0", "2to1": "2 : 1", "1to2": "1 : 2", "1to4": "1 : 4", "0to1": "0 : 1"},
        SCENE_SCORES,
        borrowed={"1to2": ("poolers", "single")},
    ),
    "poolers": VariantStudy(
        results("poolers"), {name: name for name in ("single", "parallel", "cascade")}, SCENE_SCORES
    ),
    "text_pretraining": VariantStudy(
        results("text_pretraining"),
        {"pairs": "pairs alone", "pretrained": "texts first", "alternating": "texts between", "both": "both"},
        SCENE_SCORES,
    ),
}
STUDIES |= {
    path.parent.name: importlib.import_module(f"experiments.{path.parent.name}.report")
    for path in sorted(EXPERIMENTS.glob("*/report.py"))
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("runs", nargs="*", type=Path, help="run folders whose rows are added or replaced first")
    options = parser.parse_args()
    if options.runs:
        file = results(options.study)
        write_rows(file, add_runs(read_rows(file), options.runs))
    study = STUDIES[options.study]
    if tables := study.tables():
        write_tables(tables)
        if hasattr(study, "draw"):
            study.draw()


if __name__ == "__main__":
    main()
