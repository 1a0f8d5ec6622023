"""Tables of the small photo model: its scores before and after quantisation, and captions of photos drawn at random."""

import json
from collections.abc import Sequence
from pathlib import Path

from coca_lit.runs.scores import RERANKED, cell, interval_cell, score_name
from coca_lit.tools.report.tables import Table, markdown
from experiments.study import Row, read_rows, readable, with_about, write_rows

RESULTS = Path(__file__).with_name("results.csv")
INTERVALS, DRAWN = RESULTS.with_name("intervals.csv"), RESULTS.with_name("drawn.csv")
TRAINED, SHIPPED, FOUR_BEAMS = "rewards", "shipped", "beams4_lp12"  # runs
RECALLS = [f"{side}_recall@{k}" for side in ("i2t", "t2i") for k in (1, 5, 10)]
SCORES = [
    f"flickr8k/{score}"
    for score in ("CIDEr", "Bleu_4", "METEOR", *RECALLS, *(f"{RERANKED}{recall}" for recall in RECALLS))
]
WORDS = ["flickr8k/mean_length"]
TABLED = [score for score in SCORES if not score.endswith("@10")] + WORDS  # the CSV has all
SHOWN = 10  # of the captions that were drawn


def tables() -> dict[str, str]:
    rows = {row["run"]: row for row in read_rows(RESULTS)}
    if not rows:
        return {}
    return {"photos": _scores(rows, [TRAINED, SHIPPED, FOUR_BEAMS], TABLED), "photos/drawn": _drawn()}


def _scores(rows: dict[str, Row], runs: Sequence[str], scores: Sequence[str]) -> str:
    """A line for each score; the interval is that of what is shipped, or else of what was trained."""
    shown = [run for run in runs if run in rows and any(rows[run].get(score) for score in scores)]
    titles = {TRAINED: "as trained", SHIPPED: "as shipped, int8", FOUR_BEAMS: "the same, four beams"}
    intervals = {row["score"]: (float(row["low"]), float(row["high"])) for row in read_rows(INTERVALS)}
    lines = []
    for score in (score for score in scores if any(rows[run].get(score) for run in shown)):
        values = [cell(score, float(value)) if (value := rows[run].get(score)) else "" for run in shown]
        interval = interval_cell(score, intervals[score]) if score in intervals else ""
        lines.append([score_name(score), *values, interval])
    header = ["score", *(titles[run] for run in shown), "95 % interval"]
    return with_about(header, lines, [rows[run] for run in shown if run != TRAINED])


def _drawn() -> str:
    rows = read_rows(DRAWN)[:SHOWN]
    columns = ["caption by the model", "first caption by a person"]
    lines = [[readable(row[column]) for column in columns] for row in rows]
    about = f"`{rows[-1]['command']}` at commit {rows[-1]['commit']}, {rows[-1]['machine']}."
    return f"{markdown(Table('', columns, lines))}\n\n{about}"


def add_curves(folders: Sequence[Path]) -> None:
    """Keeps the intervals of what is shipped, or else of what was trained."""
    named = {folder.name: folder for folder in folders}
    for folder in [named[name] for name in (SHIPPED, TRAINED) if name in named][:1]:
        found = json.loads((folder / "intervals.json").read_text())["intervals"]
        known = {score: limits for score, limits in found.items() if None not in limits}
        write_rows(INTERVALS, [{"score": score, "low": low, "high": high} for score, (low, high) in known.items()])
