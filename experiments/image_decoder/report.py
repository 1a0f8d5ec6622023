"""python experiments/image_decoder/report.py [RUN_FOLDERS…]"""

from pathlib import Path

from experiments.study import SCENE_SCORES, VariantStudy

NAMES = {
    "none": "no image decoder",
    "weight1": "weight 1",
    "weight10": "weight 10",
}
BORROWED = {"none": ("poolers", "single")}
STUDY = VariantStudy(Path(__file__).with_name("results.csv"), NAMES, SCENE_SCORES, BORROWED)
tables = STUDY.tables

if __name__ == "__main__":
    STUDY.report()
