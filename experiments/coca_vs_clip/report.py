"""Tables and figure of CoCa against CLIP."""

from pathlib import Path

from experiments.study import EXPERIMENTS, Row, by_variant, draw_variants, read_rows, renamed

RESULTS = Path(__file__).with_name("results.csv")
NAMES = {"clip": "CLIP", "coca": "CoCa"}
PHOTOS = {"flickr8k_clip": "CLIP", "frozen_captions": "CoCa"}  # CoCa's run is that of the study of photos
RECALL = {"t2i_recall@1": "text to image R@1", "i2t_recall@1": "image to text R@1"}
SCORES = {
    "scenes/top1": "zero-shot top-1",
    **{f"scenes/{score}": title for score, title in RECALL.items()},
    **{f"compositional/{score}": f"unseen combinations: {title}" for score, title in RECALL.items()},
}
OF_PHOTOS = {f"flickr8k/{score}": title for score, title in RECALL.items()}


def rows(names: dict[str, str]) -> list[Row]:
    return renamed(read_rows(RESULTS) + read_rows(EXPERIMENTS / "flickr8k_two_hours" / "results.csv"), names)


def tables() -> dict[str, str]:
    found = {"coca_vs_clip": (rows(NAMES), SCORES), "coca_vs_clip/flickr8k": (rows(PHOTOS), OF_PHOTOS)}
    return {name: by_variant(runs, scores) for name, (runs, scores) in found.items() if runs}


def draw() -> None:
    draw_variants(rows(NAMES), SCORES, RESULTS.with_name("coca_vs_clip.png"))
