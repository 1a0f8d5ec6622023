"""python experiments/image_decoder/report.py [RUN_FOLDERS…]"""

from pathlib import Path

from experiments.study import Row, by_variant, draw_variants, read_rows, renamed, report

RESULTS = Path(__file__).with_name("results.csv")
NAMES = {
    "none": "no image decoder",
    "weight1": "weight 1",
    "weight10": "weight 10",
}
SCORES = {
    "scenes/CIDEr": "CIDEr",
    "scenes/exact_match": "exact match",
    "scenes/t2i_recall@1": "text to image R@1",
    "scenes/i2t_recall@1": "image to text R@1",
}


def rows() -> list[Row]:
    return renamed(read_rows(RESULTS), NAMES)


def tables() -> dict[str, str]:
    return {"image_decoder": by_variant(rows(), SCORES)} if rows() else {}


def draw() -> None:
    draw_variants(rows(), SCORES, RESULTS.with_name("image_decoder.png"))


if __name__ == "__main__":
    report(RESULTS, tables, draw)
