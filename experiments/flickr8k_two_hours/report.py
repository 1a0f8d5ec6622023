"""Tables and figure of two hours on Flickr8k."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from coca_lit.runs.scores import score_name
from coca_lit.tools.report.tables import Table, markdown
from experiments.study import Row, by_variant, draw_variants, numbers, read_rows, renamed, unit, variants

RESULTS = Path(__file__).with_name("results.csv")
BEAMS = "best of 8 beams"  # chosen with the similarity of image and caption
CONSENSUS = "consensus of 8 beams"  # the one most like the training captions nearest to the photo
NAMES = {
    "frozen_captions": "frozen encoder",
    "frozen_rewards": "frozen encoder, SCST",
    "frozen_rewards_8beams_reranked": f"frozen encoder, SCST, {BEAMS}",
    "captions": "20 epochs",
    "rewards": "20 epochs, SCST",
    "captions_8beams_reranked": f"20 epochs, {BEAMS}",
    "taught": "20 epochs, taught by the average of three",
    "muon": "Muon, 10 epochs",
    "muon_8beams_reranked": f"Muon, {BEAMS}",
    "muon_8beams_neighbours": f"Muon, {CONSENSUS}",
    "muon_mixed_rewards": "Muon, mixed SCST",
    "muon_mixed_rewards_8beams_reranked": f"Muon, mixed SCST, {BEAMS}",
    "muon_mixed_rewards_8beams_neighbours": f"Muon, mixed SCST, {CONSENSUS}",
    "long": "40 epochs",
    "long_rewards": "40 epochs, SCST",
    "long_8beams_reranked": f"40 epochs, {BEAMS}",
    "long_8beams_neighbours": f"40 epochs, {CONSENSUS}",
    "long_288px_8beams_neighbours": f"40 epochs, {CONSENSUS}, 288 px",
    "long_rewards_8beams_reranked": f"40 epochs, SCST, {BEAMS}",
    "long_mixed_rewards": "40 epochs, mixed SCST",
    "long_mixed_rewards_5e-5": "40 epochs, longer mixed SCST",
    "long_mixed_rewards_8beams_weight0.1": f"40 epochs, mixed SCST, {BEAMS}",
    "long_mixed_rewards_288px_8beams_weight0.1": f"40 epochs, mixed SCST, {BEAMS}, 288 px",
    "long_mixed_rewards_8beams_neighbours": f"40 epochs, mixed SCST, {CONSENSUS}",
    "long_mixed_rewards_288px_8beams_neighbours": f"40 epochs, mixed SCST, {CONSENSUS}, 288 px",
    "long_again": "40 epochs again",
    "long_again_mixed_rewards": "40 epochs again, mixed SCST",
    "long_again_mixed_rewards_8beams_neighbours": f"40 epochs again, mixed SCST, {CONSENSUS}",
    "long_again_mixed_rewards_288px_8beams_neighbours": f"40 epochs again, mixed SCST, {CONSENSUS}, 288 px",
    "long_again_mixed_rewards_at_288px": "40 epochs again, mixed SCST at 288 px",
    "long_again_mixed_rewards_at_288px_8beams_neighbours": f"40 epochs again, mixed SCST at 288 px, {CONSENSUS}",
    "short": "10 epochs",
    "short_subwords": "10 epochs, sub-words",
    "short_modern": "10 epochs, modern text tower",
    "short_paraphrases": "10 epochs, paraphrased captions",
}
SEARCHES = {name: title for name, title in NAMES.items() if "8beams" not in name} | {
    "captions_reranked": "20 epochs, re-ranked",
    "muon_reranked": "Muon, re-ranked",
    "muon_neighbours": "Muon, normalised, re-ranked",
    "muon_mixed_rewards_reranked": "Muon, mixed SCST, re-ranked",
    "muon_mixed_rewards_neighbours": "Muon, mixed SCST, normalised, re-ranked",
    "long_reranked": "40 epochs, re-ranked",
    "long_neighbours": "40 epochs, normalised, re-ranked",
    "long_288px_neighbours": "40 epochs, normalised, 16 re-ranked, 288 px",
    "long_rewards_reranked": "40 epochs, SCST, re-ranked",
    "long_mixed_rewards_weight0.1": "40 epochs, mixed SCST, re-ranked",
    "long_mixed_rewards_288px_weight0.1": "40 epochs, mixed SCST, 16 re-ranked, 288 px",
    "long_mixed_rewards_neighbours": "40 epochs, mixed SCST, normalised, re-ranked",
    "long_mixed_rewards_288px_neighbours": "40 epochs, mixed SCST, normalised, 16 re-ranked, 288 px",
    "long_again_mixed_rewards_neighbours": "40 epochs again, mixed SCST, normalised, re-ranked",
    "long_again_mixed_rewards_288px_neighbours": "40 epochs again, mixed SCST, normalised, 16 re-ranked, 288 px",
    "long_again_mixed_rewards_at_288px_neighbours": "40 epochs again, mixed SCST at 288 px, normalised, 16 re-ranked",
}
CAPTIONS = {f"flickr8k/{score}": score_name(score) for score in ("Bleu_1", "Bleu_4", "METEOR", "CIDEr")}
TABLED = {score: title for score, title in CAPTIONS.items() if score != "flickr8k/Bleu_1"}  # the CSV has all
TABLED |= {"flickr8k/mean_length": "words per caption"}
SIDES = {"i2t": "image to text", "t2i": "text to image"}
RECALL = {f"flickr8k/{side}_recall@{k}": f"{title} R@{k}" for side, title in SIDES.items() for k in (1, 5, 10)}
WRITING, FINDING = (
    ["flickr8k/Bleu_4", "flickr8k/METEOR", "flickr8k/CIDEr"],
    [f"flickr8k/{side}_recall@1" for side in SIDES],
)
SHOWN = WRITING + FINDING
LEVERS = {  # of two or three seeds: runs without and with it, and the scores that it can change
    "twice the steps, ten views instead of six": ("captions", "long", SHOWN),
    "Muon at 2e-3, half the steps": ("captions", "muon", SHOWN),
    "consensus of 8 beams, after Muon": ("muon", "muon_8beams_neighbours", WRITING),
    "normalised by the training photos and captions, after Muon": ("muon", "muon_8beams_neighbours", FINDING),
    "SCST at 2e-5, four epochs, after 40 epochs": ("long", "long_rewards", SHOWN),
    "the same with the mixed reward": ("long", "long_mixed_rewards", SHOWN),
    "best of 8 beams at weight 0.1, after SCST with the mixed reward": (
        ("long_mixed_rewards", "long_mixed_rewards_8beams_weight0.1", WRITING)
    ),
    "decoder re-ranking, after 40 epochs": ("long", "long_reranked", FINDING),
}
WRITTEN = (  # runs in the table of captions; the CSV has all
    *("frozen_captions", "captions", "long", "long_mixed_rewards"),
    *("long_mixed_rewards_288px_8beams_weight0.1", "long_again_mixed_rewards_8beams_neighbours"),
)
FOUND = (  # and in that of retrieval
    *("frozen_captions", "captions", "long", "long_reranked", "long_288px_neighbours"),
    "long_mixed_rewards_288px_weight0.1",
)


def tables() -> dict[str, str]:
    rows = read_rows(RESULTS)
    captions = renamed(rows, {run: NAMES[run] for run in WRITTEN})
    searches = renamed([*rows, *map(_reranked, rows)], {run: SEARCHES[run] for run in FOUND})
    name = RESULTS.parent.name
    return {
        f"{name}/levers": _levers(),
        name: by_variant(captions, TABLED),
        f"{name}/retrieval": by_variant(searches, {score: RECALL[score] for score in FINDING}),
    }


def _levers() -> str:
    """What each lever changes: the mean, and the standard deviation, of the differences between runs of one seed."""
    rows = read_rows(RESULTS)
    runs = {(name, row["seed"]): row for row in [*rows, *map(_reranked, rows)] for name in variants([row])}
    lines = []
    for lever, (without, with_it, scores) in LEVERS.items():
        seeds = [seed for name, seed in runs if name == with_it and (without, seed) in runs]
        lines.append([lever, str(len(seeds))])
        for score in SHOWN:
            before, after = (numbers([runs[name, seed] for seed in seeds], score) for name in (without, with_it))
            lines[-1].append(_change(before, after) if score in scores else "")
    titles = [unit(score, title) for score, title in (CAPTIONS | RECALL).items() if score in SHOWN]
    return markdown(Table("", ["lever", "n", *titles], lines))


def _change(before: Sequence[float], after: Sequence[float]) -> str:
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return f"{round(fmean(differences), 1) + 0.0:+.1f}" + (
        f" ± {stdev(differences):.1f}" if len(differences) > 1 else ""
    )


def _rows() -> tuple[list[Row], list[Row]]:
    """The rows that compare captions, and those that compare retrieval."""
    rows = read_rows(RESULTS)
    return renamed(rows, NAMES), renamed([*rows, *map(_reranked, rows)], SEARCHES)


def _reranked(row: Row) -> Row:
    """The row of the scores after re-ranking, named so if it has them."""
    scores = {score: row[score.replace("/", "/reranked_")] for score in RECALL}
    return row | scores | {"run": row["run"].replace("8beams_", "") if all(scores.values()) else ""}


def draw() -> None:
    scores = {score: title for score, title in (CAPTIONS | RECALL).items() if score in SHOWN}
    captions, searches = _rows()
    rows = [{key: value for key, value in row.items() if key not in RECALL} for row in captions]
    rows += [{key: value for key, value in row.items() if key not in CAPTIONS} for row in searches]
    draw_variants(rows, scores, RESULTS.with_name("flickr8k_two_hours.png"))
