"""python experiments/poolers/report.py [RUN_FOLDERS…]"""

from pathlib import Path

from experiments.study import Row, by_variant, draw_variants, read_rows, renamed, report

RESULTS = Path(__file__).with_name("results.csv")
NAMES = {
    "single": "single",
    "parallel": "parallel",
    "cascade": "cascade",
}
SCORES = {
    "scenes/CIDEr": "CIDEr",
    "scenes/exact_match": "exact match",
    "scenes/t2i_recall@1": "text to image R@1",
    "scenes/i2t_recall@1": "image to text R@1",
    "samples/s": "samples/s",
}


def rows() -> list[Row]:
    return renamed(read_rows(RESULTS), NAMES)


def tables() -> dict[str, str]:
    return {"poolers": by_variant(rows(), SCORES)} if rows() else {}


def draw() -> None:
    draw_variants(rows(), SCORES, RESULTS.with_name("poolers.png"))


if __name__ == "__main__":
    report(RESULTS, tables, draw)
