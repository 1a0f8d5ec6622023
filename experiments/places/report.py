"""Table and figure of captions with and without places."""

from pathlib import Path

from experiments.study import VariantStudy

NAMES = {
    "captions": "captions alone",
    "places_steps": "with places, equal steps",
    "places_captions": "with places, equal captions",
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
