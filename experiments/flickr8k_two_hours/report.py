"""Tables and figure of two hours on Flickr8k."""

from pathlib import Path

from coca_lit.report.scores import score_name
from experiments.study import Row, by_variant, draw_variants, read_rows, renamed

RESULTS = Path(__file__).with_name("results.csv")
BEAMS = "best of 8 beams"  # chosen with the similarity of image and caption
NAMES = {
    "frozen_captions": "frozen",
    "frozen_rewards": "frozen, SCST",
    "frozen_rewards_8beams_reranked": f"frozen, SCST, {BEAMS}",
    "captions": "captions",
    "rewards": "captions, SCST",
    "captions_8beams_reranked": f"captions, {BEAMS}",
    "long": "twice the steps",
    "long_rewards": "twice the steps, SCST",
    "long_8beams_reranked": f"twice the steps, {BEAMS}",
    "long_rewards_8beams_reranked": f"twice the steps, SCST, {BEAMS}",
    "long_mixed_rewards": "twice the steps, mixed SCST",
    "long_mixed_rewards_8beams_weight0.1": f"twice the steps, mixed SCST, {BEAMS} at 0.1",
}
SEARCHES = {name: title for name, title in NAMES.items() if "8beams" not in name} | {
    "captions_reranked": "captions, re-ranked",
    "long_reranked": "twice the steps, re-ranked",
    "long_rewards_reranked": "twice the steps, SCST, re-ranked",
}
CAPTIONS = {f"flickr8k/{score}": score_name(score) for score in ("Bleu_1", "Bleu_4", "METEOR", "CIDEr")}
WORDS = {"flickr8k/mean_length": "words per caption", "flickr8k/vocabulary": "different words"}
SIDES = {"i2t": "image to text", "t2i": "text to image"}
RECALL = {f"flickr8k/{side}_recall@{k}": f"{title} R@{k}" for side, title in SIDES.items() for k in (1, 5, 10)}


def tables() -> dict[str, str]:
    captions, searches = _rows()
    name = RESULTS.parent.name
    return {
        name: by_variant(captions, {"seconds": "seconds"} | CAPTIONS | WORDS),
        f"{name}/retrieval": by_variant(searches, RECALL),
    }


def _rows() -> tuple[list[Row], list[Row]]:
    """The rows that compare captions, and those that compare retrieval."""
    rows = read_rows(RESULTS)
    return renamed(rows, NAMES), renamed([*rows, *map(_reranked, rows)], SEARCHES)


def _reranked(row: Row) -> Row:
    """The row of the scores after re-ranking, named so if it has them."""
    scores = {score: row[score.replace("/", "/reranked_")] for score in RECALL}
    return row | scores | {"run": row["run"].replace("8beams_", "") if all(scores.values()) else ""}


def draw() -> None:
    shown = ("Bleu_4", "METEOR", "CIDEr", "i2t_recall@1", "t2i_recall@1")
    scores = {score: title for score, title in (CAPTIONS | RECALL).items() if score.partition("/")[2] in shown}
    captions, searches = _rows()
    rows = [{key: value for key, value in row.items() if key not in RECALL} for row in captions]
    rows += [{key: value for key, value in row.items() if key not in CAPTIONS} for row in searches]
    draw_variants(rows, scores, RESULTS.with_name("flickr8k_two_hours.png"))
