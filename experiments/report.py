"""Tables and figure of a study, from its CSV.

    python experiments/report.py STUDY [RUN_FOLDERS…]

Run folders are added to the study's results.csv first, in place of rows with the same name. A study is listed below, or
has a `report.py` of its own with `tables() -> {name: Markdown}` and, if it has them, `draw()` for figures and
`add_curves(run_folders)` for scores along the way.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.study import (
    EXPERIMENTS,
    Row,
    TableStudy,
    VariantStudy,
    add_runs,
    by_variant,
    mean_std,
    numbers,
    read_rows,
    renamed,
    unit,
    with_about,
    write_rows,
    write_tables,
)

SCENE_SCORES = {
    "scenes/CIDEr": "CIDEr",
    "scenes/exact_match": "exact match",
    "scenes/t2i_recall@1": "text to image R@1",
    "scenes/i2t_recall@1": "image to text R@1",
}
NEGATIVE = {
    "1to2": "as it is",
    "pooler_parallel": "two poolers side by side",
    "pooler_cascade": "two poolers in a cascade",
    "image_decoder_weight1": "draws the image, weight 1",
    "image_decoder_weight10": "draws the image, weight 10",
    "text_pairs": "few pairs: alone",
    "text_pretrained": "few pairs: texts first",
    "text_alternating": "few pairs: texts between",
    "text_both": "few pairs: both",
}

DEMO = {
    "demo": "Muon, 3 epochs, batches of 128",
    "demo_batches64": "Muon, 3 epochs, batches of 64",
    "scenes": "AdamW, 6 epochs, batches of 64",
}
DEMO_SCORES = {
    "seconds": "seconds",
    **SCENE_SCORES,
    "compositional/exact_match": "exact match, unseen combinations",
    "compositional/t2i_recall@1": "text to image R@1, unseen combinations",
}

VERSIONS = {
    "python": "Python",
    "hydra-core": "Hydra",
    "omegaconf": "OmegaConf",
    "torch": "torch",
    "torchmetrics": "torchmetrics",
    "numpy": "NumPy",
    "warnings": "warnings",
    "tests": "tests",
    "seconds": "seconds",
}
VERSIONS_SCORES = {
    "scenes/exact_match": "exact match",
    "scenes/METEOR": "METEOR",
    "scenes/CIDEr": "CIDEr",
    "scenes/t2i_recall@1": "text to image R@1",
    "scenes/i2t_recall@1": "image to text R@1",
    "scenes/top1": "top-1",
}

OWN_PHOTOS = {f"photos_{count}": f"{count:,} photos" for count in (50, 500, 5000)} | {
    "photos_500_from_photos": "500 photos, init_from=photos",
    **{
        f"unseen_{count}_from_{start}": f"{count:,} photos that `photos` never saw, init_from={start}"
        for count in (100, 300, 1000)
        for start in ("photos", "null")
    },
    **{f"unseen_5000_from_{start}": f"5,000 photos, 900 never seen, init_from={start}" for start in ("photos", "null")},
}
HALF_AN_HOUR = {
    "seconds": "seconds",
    **{"flickr8k/Bleu_4": "BLEU-4", "flickr8k/METEOR": "METEOR", "flickr8k/CIDEr": "CIDEr"},
    "flickr8k/t2i_recall@1": "text to image R@1",
    "flickr8k/i2t_recall@1": "image to text R@1",
}
OWN_SCORES = {
    "seconds": "seconds",
    "my_photos/Bleu_4": "BLEU-4",
    "my_photos/METEOR": "METEOR",
    "my_photos/CIDEr": "CIDEr",
    "my_photos/i2t_recall@5": "image to text R@5",
    "my_photos/t2i_recall@5": "text to image R@5",
}


def results(name: str) -> Path:
    return EXPERIMENTS / name / "results.csv"


def negative(rows: Sequence[Row]) -> str:
    """The studies that changed nothing in one table, with the runs that they share with the study of loss weights."""
    scores = {score: title for score, title in SCENE_SCORES.items() if title != "exact match"}  # the CSV has all
    return by_variant(renamed([*read_rows(results("loss_weights")), *rows], NEGATIVE), scores)


def faults(rows: Sequence[Row]) -> str:
    """A line for each fault and one for all; the CSV also counts them by what the runs did."""
    columns = ["fault", "tried", "survived"]
    shown = [row for row in rows if not row["fault"].startswith("of these")]
    return with_about(columns, [[row[column] for column in columns] for row in shown], shown)


def demo(rows: Sequence[Row]) -> str:
    """A line for each optimizer."""
    return by_variant(renamed(rows, DEMO), DEMO_SCORES)


def flickr8k(rows: Sequence[Row]) -> str:
    """A line for the run."""
    return by_variant(renamed(rows, {"flickr8k": "experiment=flickr8k"}), HALF_AN_HOUR)


def generation_equality(rows: Sequence[Row]) -> str:
    """How many captions are equal, by strategy."""
    scores = {f"cached/{strategy}/exact_match": f"equal, {strategy}" for strategy in ("greedy", "beam", "sample")}
    return by_variant(renamed(rows, {"generation_equality": "10,000 random cases"}), scores)


def own_photos(rows: Sequence[Row]) -> str:
    """A line for each size of the folder."""
    return by_variant(renamed(rows, OWN_PHOTOS), OWN_SCORES)


def versions(rows: Sequence[Row]) -> str:
    """A line for each environment; the CSV also has a column for each step."""
    header = [*VERSIONS.values(), *(unit(score, title) for score, title in VERSIONS_SCORES.items())]
    lines = [
        [*(row[column] for column in VERSIONS), *(mean_std(numbers([row], score)) for score in VERSIONS_SCORES)]
        for row in rows
    ]
    return with_about(header, lines, rows)


STUDIES: dict[str, Any] = {
    "demo": TableStudy(results("demo"), demo),
    "faults": TableStudy(results("faults"), faults),
    "flickr8k": TableStudy(results("flickr8k"), flickr8k),
    "generation_equality": TableStudy(results("generation_equality"), generation_equality),
    "loss_weights": VariantStudy(
        results("loss_weights"),
        {"1to0": "1 : 0", "2to1": "2 : 1", "1to2": "1 : 2", "1to4": "1 : 4", "0to1": "0 : 1"},
        SCENE_SCORES,
    ),
    "own_photos": TableStudy(results("own_photos"), own_photos),
    "video": VariantStudy(
        results("video"),
        {
            "middle": "middle frame",
            "mean": "mean over frames",
            "tokens": "tokens of all frames",
            "positions": "tokens with frame positions",
        },
        {
            **{f"scenes_motion_choice/{kind}_accuracy": kind for kind in ("object", "mover", "side", "time")},
            "scenes_motion/exact_match": "exact captions",
            "scenes_motion/t2i_recall@1": "text to clip R@1",
        },
    ),
    "versions": TableStudy(results("versions"), versions),
    "negative": TableStudy(results("negative"), negative),
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
    study = STUDIES[options.study]
    if options.runs:
        file = results(options.study)
        write_rows(file, add_runs(read_rows(file), options.runs))
        if hasattr(study, "add_curves"):
            study.add_curves(options.runs)
    if tables := study.tables():
        write_tables(tables)
        if hasattr(study, "draw"):
            study.draw()


if __name__ == "__main__":
    main()
