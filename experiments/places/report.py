"""Table and figure of captions with and without places."""

from pathlib import Path

from experiments.study import VariantStudy

NAMES = {
    "captions": "captions alone, 6 passes",
    "captions12": "captions alone, 12 passes",
    "places_captions": "with places, batches of 64, 6 passes",
    "places_wide6": "with places, batches of 192, 6 passes",
    "places_wide12": "with places, batches of 192, 12 passes",
}
SCORES = {
    "scenes_places/box_accuracy": "boxes right at IoU 0.5",
    "scenes_places/name_accuracy": "things named right",
    "scenes/CIDEr": "CIDEr",
    "scenes/t2i_recall@1": "text to image R@1",
    "scenes/i2t_recall@1": "image to text R@1",
}
STUDY = VariantStudy(Path(__file__).with_name("results.csv"), NAMES, SCORES)
tables, draw = STUDY.tables, STUDY.draw
