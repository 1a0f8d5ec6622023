"""python experiments/loss_weights/report.py [RUN_FOLDERS…]"""

from pathlib import Path

from experiments.study import SCENE_SCORES, VariantStudy

NAMES = {
    "1to0": "1 : 0",
    "2to1": "2 : 1",
    "1to2": "1 : 2",
    "1to4": "1 : 4",
    "0to1": "0 : 1",
}
BORROWED = {"1to2": ("poolers", "single")}
STUDY = VariantStudy(Path(__file__).with_name("results.csv"), NAMES, SCENE_SCORES, BORROWED)
tables = STUDY.tables

if __name__ == "__main__":
    STUDY.report()
