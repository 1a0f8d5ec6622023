"""Table and figure of self-distillation."""

from pathlib import Path

from experiments.study import VariantStudy

NAMES = {"plain": "without", "local": "local crops", "masked": "masked cells", "both": "both"}
SCORES = {
    "scenes/segmentation/miou": "mIoU of a linear probe",
    "scenes/linear/top1": "classes by a linear probe",
    "scenes/CIDEr": "CIDEr",
    "scenes/t2i_recall@1": "text to image R@1",
    "scenes/i2t_recall@1": "image to text R@1",
}
STUDY = VariantStudy(Path(__file__).with_name("results.csv"), NAMES, SCORES)
tables, draw = STUDY.tables, STUDY.draw
