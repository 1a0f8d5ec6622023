"""Table and figure of CoCa against CLIP on scenes; the CSV has photos, too."""

from pathlib import Path

from experiments.study import VariantStudy

RECALL = {"t2i_recall@1": "text to image R@1", "i2t_recall@1": "image to text R@1"}
SCORES = {
    "scenes/top1": "zero-shot top-1",
    **{f"scenes/{score}": title for score, title in RECALL.items()},
    **{f"compositional/{score}": f"unseen combinations: {title}" for score, title in RECALL.items()},
}
STUDY = VariantStudy(Path(__file__).with_name("results.csv"), {"clip": "CLIP", "coca": "CoCa"}, SCORES)
tables, draw = STUDY.tables, STUDY.draw
