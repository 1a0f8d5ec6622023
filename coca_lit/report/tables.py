"""Tables of scores: of one run beside published results, and of several runs side by side."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from coca_lit.report.run import Run, differences

PUBLISHED = Path(__file__).parents[1] / "assets" / "published.json"
COUNTS = (
    "mean_length",
    "vocabulary",
    "median_rank",
)  # of everything else papers print the hundredfold
NAMES = {
    "Bleu_1": "BLEU-1",
    "Bleu_2": "BLEU-2",
    "Bleu_3": "BLEU-3",
    "Bleu_4": "BLEU-4",
    "ROUGE_L": "ROUGE-L",
    "exact_match": "exact matches, %",
    "mean_length": "words per caption",
    "vocabulary": "different words",
    "distinct_1": "distinct-1, %",
    "distinct_2": "distinct-2, %",
    "novel": "novel captions, %",
    "accuracy": "accuracy, %",
    "top1": "top-1, %",
    "top5": "top-5, %",
    "mean_per_class_recall": "mean per-class recall, %",
}


HEADLINES = ("/CIDEr", "_recall@1", "/top1", "/accuracy")  # the scores that a reader looks for first
GROUPS = {"retrieval": ("t2i_", "i2t_"), "zero-shot classification": ("top", "mean_per_class")}  # by how names begin


class Table(NamedTuple):
    """Cells as texts; the first column names the rows. A row of one cell names the group of rows below it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


def score_tables(run: Run) -> list[Table]:
    """One table for each data set of a run: its scores, those of each domain, and published ones of the same table."""
    published = json.loads(PUBLISHED.read_text())
    tables = []
    for name in dict.fromkeys(key.split("/")[0] for key in run.results):
        groups = [g for g in dict.fromkeys(key.rpartition("/")[0] for key in run.results) if g.split("/")[0] == name]
        columns = {
            "this run" if group == name else group.removeprefix(f"{name}/"): _scores(run, group) for group in groups
        }
        scores = list(dict.fromkeys(score for column in columns.values() for score in column))
        others = {k: v for k, v in published.get(name, {}).items() if v.keys() & set(scores)}
        note = "Published: on the test split, in OpenCLIP's result files or the CoCa paper." if others else ""
        columns |= others
        rows = {s: [score_name(s), *(cell(s, column.get(s)) for column in columns.values())] for s in scores}
        tables.append(Table(name, ["", *columns], _grouped(rows), note))
    return tables


def headlines(run: Run) -> list[tuple[str, str, str]]:
    """Value, name and data set of the first scores to look at."""
    chosen = [key for key in run.results if key.endswith(HEADLINES) and key.count("/") == 1]
    return [(cell(key, run.results[key]), score_name(key), key.partition("/")[0]) for key in chosen]


def comparison_tables(runs: Sequence[Run]) -> list[Table]:
    """What the runs differ in, and all their scores."""
    names = [run.name for run in runs]
    changed = [[key, *map(str, values)] for key, values in differences(runs).items()]
    scores = dict.fromkeys(score for run in runs for score in run.results)
    rows = [[f"{s.rpartition('/')[0]} {score_name(s)}", *(cell(s, run.results.get(s)) for run in runs)] for s in scores]
    return [Table("settings that differ", ["", *names], changed), Table("scores", ["", *names], rows)]


def _grouped(rows: Mapping[str, list[str]]) -> list[list[str]]:
    """Rows of scores, under the names of their groups if there are several."""
    groups: dict[str, list[list[str]]] = {}
    for score, row in rows.items():
        group = next((name for name, starts in GROUPS.items() if score.startswith(starts)), "captions")
        groups.setdefault(group, []).append(row)
    if len(groups) == 1:
        return list(rows.values())
    return [row for name, members in groups.items() for row in ([name], *members)]


def score_name(score: str) -> str:
    """A score as a reader knows it: "mscoco/t2i_recall@1" -> "text to image recall@1, %"."""
    short = score.rpartition("/")[2]
    for key, direction in (("t2i_", "text to image "), ("i2t_", "image to text ")):
        if short.startswith(key):
            rest = short.removeprefix(key)
            return direction + (f"{rest}, %" if rest.startswith("recall") else rest.replace("_", " "))
    return NAMES.get(short, short)


def shown(score: str, value: float) -> float:
    """The value in the unit that `cell` prints."""
    return value if score.endswith(COUNTS) else 100 * value


def cell(score: str, value: float | None) -> str:
    """The value as papers print it, with one or two decimals; nothing for None."""
    if value is None:
        return ""
    return f"{shown(score, value):.1f}" if score.endswith(COUNTS) else f"{shown(score, value):.2f}"


def _scores(run: Run, group: str) -> dict[str, float]:
    prefix = f"{group}/"
    return {k.removeprefix(prefix): v for k, v in run.results.items() if k.rpartition("/")[0] == group}
