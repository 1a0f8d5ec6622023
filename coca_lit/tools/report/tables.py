"""Tables of runs: the scores of one run beside published ones, several runs side by side. The cells are plain text."""

import html
import json
import math
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from coca_lit import extensions
from coca_lit.metrics import lower_is_better
from coca_lit.metrics.uncertainty import difference
from coca_lit.reading import printable
from coca_lit.runs.scores import (
    DIRECTIONS,
    RERANKED,
    STATISTICS,
    cell,
    data_name,
    headlines_of,
    interval_cell,
    own_scores,
    score_name,
    spread_cell,
    way_name,
)
from coca_lit.tools.report.runs import Run, differences, obstacles, same_data

PUBLISHED = Path(__file__).parents[2] / "assets" / "published.json"
GROUPS = {  # by how the names of scores begin, with a / behind them; all others are of captions
    "retrieval": (*DIRECTIONS, "cut_captions", "read_tokens"),
    "retrieval re-ranked by the decoder": (RERANKED,),
    "classification": ("top", "mean_per_class", "accuracy", "p/"),
}
SCALES = {  # ends of names of scores -> what their numbers mean
    "CIDEr": "CIDEr goes from 0 to 1,000 and is no percentage. Published models have 100 to 145 on MSCOCO; built-in "
    "scenes give several hundred, as their few words and fixed sentences are easy to repeat.",
    "CLIPScore": "CLIPScore is 250 times the cosine of image and caption: it compares captions under one judge.",
    "recall@1": "Recall@K: how often a right answer is among the first K. Among fewer candidates it is higher.",
    "median_rank": "Median rank: 1 is best.",
}
TILES = 5
HEADLINES_OF_A_SWEEP = 4
INTERVAL = "95 % interval"
THIS_RUN = "this run"
INTERVALS_NOTE = "Intervals: Wilson's of shares, else bootstrap over the images."
NOISE = "within noise"
APART = "not comparable"
MARK = " †"  # behind a score that cannot be compared with that of the first run
MARK_NOTE = f"†: {APART} with the first run, see below."
BEST_NOTE = "Bold: the best."
DIFFERENCES_NOTE = (
    "Difference: the second run minus the first. Intervals and p: paired bootstrap over the images that both runs were "
    f"scored on. '{NOISE}': p is at least 0.05; of twenty scores, one falls below that by chance. Training again with "
    "another seed adds noise that these intervals do not hold. Bold: better by the test."
)


class Table(NamedTuple):
    """The first column names the rows. A row of one cell is the heading of the rows below it.

    `best` are the cells to mark, as (row, column).
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    best: Collection[tuple[int, int]] = ()


def markdown(table: Table, literal: bool = False) -> str:
    """Header and rows in Markdown, without title and note.

    Args:
        literal: the cells are plain text, as names are, and not Markdown themselves.
    """
    written = plain if literal else str
    width = len(table.header)
    cells = [[written(text) for text in row] for row in table.rows]
    for row, column in table.best:
        cells[row][column] = f"**{cells[row][column]}**"
    rows = [row if len(row) > 1 or width == 1 else [f"**{row[0]}**", *[""] * (width - 1)] for row in cells]
    lines = [[written(text) for text in table.header], ["---"] * width, *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def plain(text: str) -> str:
    """Text for Markdown that means itself: names of runs and data sets come from anywhere."""
    return re.sub(r"[\[\]`]", r"\\\g<0>", html.escape(one_line(text), quote=False))


def code(text: str) -> str:
    """Text as code in Markdown, backticks included."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{one_line(text)}{pad}{fence}"


def one_line(text: str) -> str:
    return printable(" ".join(text.split()))


# One run


def headline_cells(run: Run) -> list[tuple[str, str, str, str]]:
    """Value, interval, name and data set of the scores that say most about a run."""
    shown = headlines_of(run.results, TILES) or own_scores(run.results)
    return [(run.cell(s), run.interval(s), _own_name([run], s), with_images([run], s)) for s in shown]


def score_tables(run: Run) -> list[Table]:
    """One table for each data set and number of images of a run: its scores with intervals, scores per domain, and the
    published ones of the same table.
    """
    # data set and number of images -> "this run" or domain -> score -> its full name
    of_data: dict[tuple[str, int | None], dict[str, dict[str, str]]] = {}
    for key in run.results:
        group, _, score = key.rpartition("/")
        name, _, domain = group.partition("/")
        whole = f"{name}/{score}"
        images = run.images(whole if whole in run.results else key)
        of_data.setdefault((name, images), {}).setdefault(domain or THIS_RUN, {})[score] = key
    return [_score_table(run, name, images, keys) for (name, images), keys in of_data.items()]


def _score_table(run: Run, name: str, images: int | None, keys: Mapping[str, Mapping[str, str]]) -> Table:
    columns: dict[str, dict[str, str]] = {}  # header -> score -> cell
    own = keys.get(THIS_RUN, {})
    notes: list[str] = []
    for column, of_column in keys.items():
        columns[way_name(column)] = {score: run.cell(key) for score, key in of_column.items()}
        if of_column is own and any(key in run.draws for key in own.values()):
            columns[INTERVAL] = {score: run.interval(key) for score, key in own.items()}
            notes.append(INTERVALS_NOTE)
    scores = list(dict.fromkeys(score for of_column in keys.values() for score in of_column))
    notes += [text for end, text in SCALES.items() if any(score.endswith(end) for score in scores)]
    # Beside a probe, of which the whole data set has other scores, zero-shot accuracies would mislead.
    sources: dict[str, list[str]] = {}
    for row in _published(run, name, own, images):
        title = f"{row['name']}, {row['split']} split" if "split" in row else row["name"]
        columns[title] = {score: cell(score, value) for score, value in row["scores"].items()}
        sources.setdefault(row["source"], []).append(row["name"])
    if sources:
        origins = [f"{source} ({'; '.join(names)})" for source, names in sources.items()]
        notes.append(f"Published: {', '.join(origins)}.")
    groups: dict[str, list[list[str]]] = {}
    for score in scores:
        cells = [column.get(score, "") for column in columns.values()]
        groups.setdefault(_group_of(score), []).append([_own_name([run], score), *cells])
    rows: list[list[str]] = []
    for group, members in groups.items():
        rows += [*([[group]] if len(groups) > 1 else []), *members]
    title = data_name(name) + (f", {images:,} images" if images is not None else "")
    return Table(title, ["", *columns], rows, " ".join(notes))


def _published(run: Run, name: str, scores: Collection[str], images: int | None) -> list[dict[str, Any]]:
    """Published scores of a data set, of which one is among `scores`.

    Some may stand only beside scores of the same split: they come from tables that compare models on that split. None
    is shown with scores of fewer images, among which retrieval is easier.
    """
    split = run.config.get("scoring.split")
    return [
        row
        for row in json.loads(PUBLISHED.read_text()).get(name, [])
        if row["scores"].keys() & set(scores)
        and (row.get("split") == split or not row.get("only_beside_its_split"))
        and (images is None or images >= row.get("images", 0))
    ]


def _group_of(score: str) -> str:
    for group, starts in GROUPS.items():
        if f"{score}/".startswith(starts):
            return group
    declared = extensions.scores().get(score.rpartition("/")[2])
    if declared is not None:
        return declared.group
    return "classification" if score.endswith("_accuracy") else "captions"


def with_images(runs: Sequence[Run], score: str) -> str:
    """The data set of a score and, if the runs agree on it, on how many images it was computed."""
    counts = {run.images(score) for run in runs if score in run.results}
    count = counts.pop() if len(counts) == 1 else None
    return data_name(score.rpartition("/")[0]) + (f", {count:,} images" if count is not None else "")


def _own_name(runs: Sequence[Run], score: str) -> str:
    """The name of a score; CLIPScore says whose it is, if all runs have the same judge or each is its own."""
    judges = {run.config.get("scoring.clip_score_model") for run in runs}
    if not score.endswith("CLIPScore") or len(judges) > 1:
        return score_name(score)
    return f"{score_name(score)} by {judges.pop() or 'the model itself'}"


def _full_name(score: str) -> str:
    return f"{data_name(score.rpartition('/')[0])} {score_name(score)}"


# Several runs


def run_names(runs: Sequence[Run]) -> list[str]:
    """Names of runs for headers and labels. Jobs of a sweep are named after settings; their keys are shortened where
    that still tells the jobs apart: "model.optimizer.lr=1e-3" -> "lr=1e-3".
    """
    return _short([run.name for run in runs])


def _short(names: Sequence[str]) -> list[str]:
    short = [re.sub(r"(?:\w+\.)+(\w+)=", r"\1=", name) for name in names]
    return short if len({*short}) == len(names) else [*names]


def _short_keys(keys: Collection[str]) -> list[str]:
    """Config keys as `_short` has them: "model.optimizer.lr" -> "lr"."""
    return [name.removesuffix("=") for name in _short([f"{key}=" for key in keys])]


def runs_table(runs: Sequence[Run], failed: Collection[str], objective: str | None) -> Table:
    """A line for each run: the settings in which they differ, status, objective and four headline scores, or else
    the first scores.

    Args:
        failed: names of jobs without results.
    """
    varied = differences(runs)
    results = dict.fromkeys(score for run in runs for score in run.results)
    scores = dict.fromkeys([objective] if objective in results else [])
    scores |= dict.fromkeys(headlines_of(results, HEADLINES_OF_A_SWEEP) or own_scores(results))
    names = _short([*(run.name for run in runs), *failed])
    rows = [[name] for name in names]
    for values in varied.values():
        for row, value in zip(rows, values, strict=False):
            row.append(setting_cell(value))
    best: list[tuple[int, int]] = []
    notes = ""
    for row in rows[: len(runs)]:
        row.append("ok")
    for score in scores:
        cells, marked = _cells(runs, score)
        best += [(place, len(rows[0])) for place in _best(score, cells)]
        notes = MARK_NOTE if marked else notes
        for row, text in zip(rows, cells, strict=False):
            row.append(text)
    for row in rows[len(runs) :]:
        row += [*[""] * len(varied), "failed", *[""] * len(scores)]
    header = ["", *_short_keys(varied), "status", *map(_full_name, scores)]
    return Table("runs", header, rows, " ".join(filter(None, [BEST_NOTE if best else "", notes])), best)


def settings_table(runs: Sequence[Run]) -> Table:
    """The settings in which the runs differ."""
    rows = [[key, *map(setting_cell, values)] for key, values in differences(runs).items()]
    return Table("settings that differ", ["", *run_names(runs)], rows)


def setting_cell(value: Any) -> str:
    """A setting for readers: null is the default of a constructor, what only the launch could resolve is its own name,
    and Optuna draws numbers of 17 digits.
    """
    text = "default" if value is None else re.sub(r"\$\{(?:[\w.]+:)?([^{}]*)\}", r"\1", str(value))
    return f"{float(text):.4g}" if re.fullmatch(r"\d+\.\d{5,}(e-?\d+)?", text) else text


def all_scores(runs: Sequence[Run], chosen: Collection[str] | None = None) -> Table:
    """All scores of the runs side by side, or the chosen ones; of two runs with intervals, and whether their difference
    is more than noise.
    """
    rows: list[list[str]] = []
    best: list[tuple[int, int]] = []
    marks = False
    for heading, scores in _by_data(runs, chosen).items():
        rows.append([heading])
        for score in scores:
            if len(runs) == 2:
                cells, winners = _difference_cells(runs[0], runs[1], score)
            else:
                cells, marked = _cells(runs, score)
                winners = _best(score, cells)
                marks = marks or marked
            best += [(len(rows), 1 + winner) for winner in winners]
            rows.append([_own_name(runs, score), *cells])
    names = run_names(runs)
    if len(runs) == 2:
        header = ["", names[0], INTERVAL, names[1], INTERVAL, "difference", INTERVAL, "p", ""]
        return Table("scores", header, rows, DIFFERENCES_NOTE, best)
    notes = [BEST_NOTE if best else "", MARK_NOTE if marks else ""]
    return Table("scores", ["", *names], rows, " ".join(filter(None, notes)), best)


def _by_data(runs: Sequence[Run], chosen: Collection[str] | None = None) -> dict[str, list[str]]:
    """All scores of the runs, or the chosen ones, by data set and number of images as `with_images` names them."""
    of_data: dict[str, list[str]] = {}
    for score in dict.fromkeys(score for run in runs for score in run.results) if chosen is None else chosen:
        of_data.setdefault(with_images(runs, score), []).append(score)
    return of_data


def _cells(runs: Sequence[Run], score: str) -> tuple[list[str], bool]:
    """The score of each run, and whether one is marked as not comparable."""
    marked = obstacles(runs, score)
    return [run.cell(score) + (MARK if why else "") for run, why in zip(runs, marked, strict=True)], any(marked)


def _best(score: str, cells: Sequence[str]) -> list[int]:
    """The places of the best value as it is printed; none if all are equal, or one is marked, and none for a statistic
    that is neither good nor bad.
    """
    values = {place: text for place, text in enumerate(cells) if text and text != "nan"}
    if len(set(values.values())) < 2 or score.endswith((*STATISTICS, "/p")) or any(MARK in text for text in cells):
        return []
    numbers = {place: float(text) for place, text in values.items()}
    best = (min if lower_is_better(score) else max)(numbers.values())
    return [place for place, number in numbers.items() if number == best]


def best_run(results: Mapping[str, Mapping[str, float]], score: str) -> str | None:
    """The run with the best `score`; None if no run has it.

    Args:
        results: run -> score -> value.
    """
    values = {run: scores[score] for run, scores in results.items() if not math.isnan(scores.get(score, math.nan))}
    return (min if lower_is_better(score) else max)(values, key=values.__getitem__, default=None)


def not_comparable(runs: Sequence[Run], chosen: Collection[str] | None = None) -> dict[str, str]:
    """Which of all scores, or of the chosen ones, cannot be compared, or data sets where that holds for all -> why."""
    found: dict[str, str] = {}
    names = run_names(runs)
    for scores in _by_data(runs, chosen).values():
        reasons: dict[str, str] = {}
        for score in scores:
            if sum(score in run.results for run in runs) > 1:
                why = [(reason, name) for reason, name in zip(obstacles(runs, score), names, strict=True) if reason]
                reasons[score] = "; ".join(f"{reason} ({name})" if len(runs) > 2 else reason for reason, name in why)
        if len(set(reasons.values())) == 1:
            reasons = {scores[0].rpartition("/")[0]: next(iter(reasons.values()))}
            found |= {data_name(data): why for data, why in reasons.items() if why}
        else:
            found |= {_full_name(score): why for score, why in reasons.items() if why}
    return found


class Comparison(NamedTuple):
    """A score of two runs.

    Attributes:
        cells: difference, its interval and p for readers; empty if it cannot be tested.
        why_not: why the scores cannot be compared; empty if they can.
        better: 0 or 1 for the run that is better by the test; None for neither.
        verdict: in words.
    """

    cells: list[str]
    why_not: str
    better: int | None
    verdict: str


def compared(first: Run, second: Run, score: str) -> Comparison:
    """Whether one run is better than the other by a score that both have. Only if that was computed on the same data
    under the same conditions, and the difference is more than noise.
    """
    runs = [first, second]
    why_not = obstacles(runs, score)[1]
    untested = Comparison(["", "", ""], why_not, None, APART if why_not else "")
    own = first.draws.get(score)
    other = second.draws.get(score)
    if own is None or other is None or not same_data(runs, score):
        return untested
    if own.units != other.units or own.values.shape != other.values.shape:  # as in folds of other sizes
        return untested._replace(verdict=APART)
    found = difference(own, other)
    if math.isnan(found.p):
        return untested
    images = first.images(score)
    change = cell(score, found.value, images)
    signed = change if change.startswith("-") else f"+{change}"
    cells = [signed, interval_cell(score, (found.low, found.high), images), f"{found.p:.3f}"]
    if why_not or found.noise or score.endswith(STATISTICS):
        return Comparison(cells, why_not, None, APART if why_not else NOISE if found.noise else "differs")
    better = int((found.value > 0) != lower_is_better(score))
    return Comparison(cells, "", better, f"{run_names(runs)[better]} is better")


def _difference_cells(first: Run, second: Run, score: str) -> tuple[list[str], list[int]]:
    """Both scores with intervals, their difference and the verdict; and the place of the better one."""
    own = [first.cell(score), first.interval(score), second.cell(score), second.interval(score)]
    if score not in first.results or score not in second.results:
        return [*own, "", "", "", ""], []
    found = compared(first, second, score)
    return [*own, *found.cells, found.verdict], [] if found.better is None else [2 * found.better]


def seed_tables(runs: Sequence[Run]) -> list[Table]:
    """Means and standard deviations of runs that differ in their seed alone; none if no two do."""
    varied = differences(runs)
    others = [key for key in varied if key != "seed"]
    groups: dict[str, list[Run]] = {}
    for i, run in enumerate(runs if "seed" in varied else ()):
        words = [
            f"{name}={setting_cell(varied[key][i])}" for key, name in zip(others, _short_keys(others), strict=True)
        ]
        groups.setdefault(", ".join(words), []).append(run)
    columns = {words: members for words, members in groups.items() if len(members) > 1}
    if not columns:
        return []
    header = [", ".join(filter(None, [words, f"{len(members)} seeds"])) for words, members in columns.items()]
    rows = []
    for score in dict.fromkeys(score for run in runs for score in run.results):
        cells = [_over_seeds(members, score) for members in columns.values()]
        rows.append([_full_name(score), *cells])
    return [Table("seeds", ["", *header], rows, "Mean ± standard deviation of a run over the seeds.")]


def _over_seeds(runs: Sequence[Run], score: str) -> str:
    values = [run.results[score] for run in runs if score in run.results]
    if len(values) < 2 or not same_data(runs, score) or not all(map(math.isfinite, values)):
        return ""
    text = spread_cell(score, statistics.mean(values), statistics.stdev(values), runs[0].images(score))
    return text if len(values) == len(runs) else f"{text} ({len(values)} seeds)"
