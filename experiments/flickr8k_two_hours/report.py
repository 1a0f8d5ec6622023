"""Table and figure of two hours on Flickr8k."""

from pathlib import Path

from coca_lit.report.scores import score_name
from experiments.study import by_variant, draw_variants, read_rows

RESULTS = Path(__file__).with_name("results.csv")
SCORES = {
    "seconds": "seconds",
    **{f"flickr8k/{score}": score_name(score) for score in ("Bleu_1", "Bleu_4", "METEOR", "CIDEr")},
    **{f"flickr8k/{side}_recall@{k}": f"{side} R@{k}" for side in ("i2t", "t2i") for k in (1, 5, 10)},
    **{f"flickr8k/reranked_{side}_recall@1": f"{side} R@1 re-ranked" for side in ("i2t", "t2i")},
}


def tables() -> dict[str, str]:
    rows = read_rows(RESULTS)
    return {"flickr8k_two_hours": by_variant(rows, SCORES)} if rows else {}


def draw() -> None:
    shown = ("Bleu_4", "METEOR", "CIDEr", "i2t_recall@1", "t2i_recall@1")
    scores = {f"flickr8k/{score}": SCORES[f"flickr8k/{score}"] for score in shown}
    draw_variants(read_rows(RESULTS), scores, RESULTS.with_name("flickr8k_two_hours.png"))
