"""python experiments/poolers/report.py [RUN_FOLDERS…]"""

from pathlib import Path

from experiments.study import SCENE_SCORES, VariantStudy

NAMES = {
    "single": "single",
    "parallel": "parallel",
    "cascade": "cascade",
}
STUDY = VariantStudy(Path(__file__).with_name("results.csv"), NAMES, SCENE_SCORES)
tables = STUDY.tables

if __name__ == "__main__":
    STUDY.report()
