"""Tables of runs: the scores of one run beside published ones, several runs side by side.

A `Table` is plain text cells; `markdown` and `coca_lit.tools.report.page` render it.
"""

import html
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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
from coca_lit.weights.hub import PREFIX, released

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
PUBLISHED_SCORES = "Published"  # begins the sentence on their sources
NOISE = "within noise"
APART = "not comparable"
MARK = " †"  # behind a score that cannot be compared with that of the first run
MARK_NOTE = f"†: {APART} with the first run, see below."
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


def score_tables(run: Run) -> list[Table]:
    """One table for each data set and number of images of a run: its scores with intervals, scores per domain, and the
    published ones of the same table; and one of the parameters.
    """
    tables = []
    # data set and number of images -> "this run" or domain -> score -> value
    of_data: dict[tuple[str, int | None], dict[str, dict[str, float]]] = {}
    for key, value in run.results.items():
        group, _, score = key.rpartition("/")
        name, _, domain = group.partition("/")
        whole = f"{name}/{score}"
        images = run.images(whole if whole in run.results else key)
        of_data.setdefault((name, images), {}).setdefault(domain or THIS_RUN, {})[score] = value
    for (name, images), own in of_data.items():
        scores = list(dict.fromkeys(score for column in own.values() for score in column))
        # Beside a probe, of which the whole data set has other scores, zero-shot accuracies would mislead.
        published, sources = _published(run, name, [*own.get(THIS_RUN, {})], images)
        columns = own | published
        whole_names = {column: name if column == THIS_RUN else f"{name}/{column}" for column in own}
        rows: dict[str, list[str]] = {}
        for s in scores:
            cells = [cell(s, own[c].get(s), run.images(f"{data}/{s}")) for c, data in whole_names.items()]
            # Published scores have their own decimals.
            rows[s] = [_own_name([run], s), *cells, *(cell(s, column.get(s)) for column in published.values())]
        scales = [text for end, text in SCALES.items() if any(score.endswith(end) for score in scores)]
        header = ["", *(way_name(column) for column in columns)]
        notes = [*scales, *sources]
        if THIS_RUN in columns and any(f"{name}/{s}" in run.draws for s in scores):
            place = header.index(THIS_RUN) + 1
            header.insert(place, INTERVAL)
            for s, row in rows.items():
                row.insert(place, run.interval(f"{name}/{s}"))
            notes = [INTERVALS_NOTE, *notes]
        title = data_name(name) + (f", {images:,} images" if images is not None else "")
        tables.append(Table(title, header, _grouped(rows), " ".join(notes)))
    sizes = run.environment.get("parameters")
    if sizes:
        published, sources = _published(run, "parameters", list(sizes))
        columns = {THIS_RUN: sizes} | published
        counts = [[k, *(f"{c[k] / 1e6:,.2f} M" if k in c else "" for c in columns.values())] for k in sizes]
        tables.append(Table("parameters", ["", *columns], counts, " ".join(sources)))
    return tables


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


def _published(
    run: Run, name: str, scores: Sequence[str], images: int | None = None
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Columns of published scores of a data set, if one of them is among `scores`, and a sentence about their sources.

    Some may stand only beside scores of the same split: they come from tables that compare models on that split. None
    is shown with scores of fewer images, among which retrieval is easier.
    """
    split = run.config.get("scoring.split")
    columns: dict[str, dict[str, float]] = {}
    sources: dict[str, list[str]] = {}
    for row in json.loads(PUBLISHED.read_text()).get(name, []):
        if not row["scores"].keys() & set(scores) or (row.get("only_beside_its_split") and row["split"] != split):
            continue
        if images is not None and images < row.get("images", 0):
            continue
        title = f"{row['name']}, {row['split']} split" if "split" in row else row["name"]
        columns[title] = row["scores"]
        sources.setdefault(row["source"], []).append(row["name"])
    origins = [f"{source} ({'; '.join(names)})" for source, names in sources.items()]
    return columns, [f"{PUBLISHED_SCORES}: {', '.join(origins)}."] if origins else []


def published_scores(runs: Sequence[Run], score: str) -> tuple[list[float], list[str]]:
    """What is published of the released models that were scored: a value for each run, NaN where there is none of the
    same images and texts, and the sources.
    """
    data, _, name = score.rpartition("/")
    known = [row for row in json.loads(PUBLISHED.read_text()).get(data, []) if "model" in row and name in row["scores"]]
    values = []
    sources = []
    for run in runs:
        model = released(str(run.config.get("checkpoint")).removeprefix(PREFIX))
        of = run.conditions.get(score)
        if run.config.get("interpolate_with") is not None:  # these are other weights
            model = None
        key = (model.name, of.images, of.split, of.texts) if model is not None and of is not None else ("", 0, "", 0)
        own = [
            row
            for row in known
            if (row["model"], row["images"], row.get("split", key[2]), row.get("texts", key[3])) == key
        ]
        values.append(own[0]["scores"][name] if own else math.nan)
        sources += [row["source"] for row in own[:1]]
    return values, list(dict.fromkeys(sources))


def headline_cells(run: Run) -> list[tuple[str, str, str, str]]:
    """Value, interval, name and data set of the scores that say most about a run."""
    shown = headlines_of(run.results, TILES) or own_scores(run.results)
    return [(run.cell(s), run.interval(s), _own_name([run], s), with_images([run], s)) for s in shown]


def runs_table(runs: Sequence[Run], failed: Collection[str], objective: str | None) -> Table:
    """A line for each run: the settings in which they differ, status, objective and four headline scores, or else
    the first scores.

    Args:
        failed: names of jobs without results.
    """
    varied = differences(runs)
    results = dict.fromkeys(score for run in runs for score in run.results)
    first = [objective] if objective in results else []
    scores = list(dict.fromkeys([*first, *(headlines_of(results, HEADLINES_OF_A_SWEEP) or own_scores(results))]))
    header = ["", *short_names(list(varied)), "status"]
    marked = {score: obstacles(runs, score) for score in scores}
    names = _short_runs([*(run.name for run in runs), *failed])
    rows = [
        [name, *(setting_cell(settings[i]) for settings in varied.values()), "ok"]
        for i, name in enumerate(names[: len(runs)])
    ]
    columns: dict[str, int] = {}
    origins: list[str] = []
    for score in scores:
        columns[score] = len(header)
        header.append(_full_name(score))
        for row, run, why_not in zip(rows, runs, marked[score], strict=True):
            row.append(run.cell(score) + (MARK if why_not else ""))
        values, sources = published_scores(runs, score)
        if sources:
            header.append(f"{_full_name(score)}, published")
            for row, value in zip(rows, values, strict=True):
                row.append("" if math.isnan(value) else cell(score, value))
            origins += sources
    best = [
        (row - 1, column)
        for s, column in columns.items()
        if not any(marked[s])
        for row in _best(s, [r[column] for r in rows])
    ]
    empty = [""] * (len(header) - 2 - len(varied))
    rows += [[name, *[""] * len(varied), "failed", *empty] for name in names[len(runs) :]]
    notes = ["Bold: the best of a column."] if best else []
    notes += [MARK_NOTE] if any(map(any, marked.values())) else []
    notes += [f"{PUBLISHED_SCORES}: {', '.join(dict.fromkeys(origins))}."] if origins else []
    return Table("runs", header, rows, " ".join(notes), best)


def run_names(runs: Sequence[Run]) -> list[str]:
    """Names of runs for headers and labels."""
    return _short_runs([run.name for run in runs])


def _short_runs(names: Sequence[str]) -> list[str]:
    """Jobs of a sweep are named after settings; their keys are shortened where that still tells the jobs apart:
    "model.optimizer.lr=1e-3" -> "lr=1e-3".
    """
    short = [re.sub(r"(?:\w+\.)+(\w+)=", r"\1=", name) for name in names]
    return short if len({*short}) == len(names) else [*names]


def settings_table(runs: Sequence[Run]) -> Table:
    """The settings in which the runs differ."""
    rows = [[key, *map(setting_cell, values)] for key, values in differences(runs).items()]
    return Table("settings that differ", ["", *run_names(runs)], rows)


def all_scores(runs: Sequence[Run]) -> Table:
    """All scores of the runs side by side."""
    rows: list[list[str]] = []
    best: list[tuple[int, int]] = []
    marks = False
    for heading, scores in _by_data(runs).items():
        rows.append([heading])
        for score in scores:
            marked = obstacles(runs, score)
            row = [run.cell(score) + (MARK if why else "") for run, why in zip(runs, marked, strict=True)]
            marks |= any(marked)
            best += [(len(rows), column) for column in ([] if any(marked) else _best(score, row))]
            rows.append([_own_name(runs, score), *row])
    notes = [*(["Bold: the best of a row."] if best else []), *([MARK_NOTE] if marks else [])]
    return Table("scores", ["", *run_names(runs)], rows, " ".join(notes), best)


def _by_data(runs: Sequence[Run]) -> dict[str, list[str]]:
    """All scores of the runs, by data set and number of images as `with_images` names them."""
    of_data: dict[str, list[str]] = {}
    for score in dict.fromkeys(score for run in runs for score in run.results):
        of_data.setdefault(with_images(runs, score), []).append(score)
    return of_data


def not_comparable(runs: Sequence[Run]) -> dict[str, str]:
    """Scores that cannot be compared, or data sets where that holds for most of the scores -> why."""
    found: dict[str, str] = {}
    names = run_names(runs)
    for scores in _by_data(runs).values():
        data = data_name(scores[0].rpartition("/")[0])
        shared = [score for score in scores if sum(score in run.results for run in runs) > 1]
        reasons = {
            score: "; ".join(
                f"{why} ({names[i]})" if len(runs) > 2 else why for i, why in enumerate(obstacles(runs, score)) if why
            )
            for score in shared
        }
        for reason in dict.fromkeys(filter(None, reasons.values())):
            members = [score for score in shared if reasons[score] == reason]
            most = 2 * len(members) > len(shared) and data not in found
            found |= {data: reason} if most else dict.fromkeys(map(_full_name, members), reason)
    return found


def _best(score: str, cells: Sequence[str]) -> list[int]:
    """The columns, counted behind the name, with the best value as it is printed; none if all are equal, and none for a
    statistic that is neither good nor bad.
    """
    values = {column: float(text) for column, text in enumerate(cells, start=1) if text and text != "nan"}
    if len(set(values.values())) < 2 or score.endswith((*STATISTICS, "/p")):
        return []
    best = (min if lower_is_better(score) else max)(values.values())
    return [column for column, value in values.items() if value == best]


def best_run(results: Mapping[str, Mapping[str, float]], score: str) -> str | None:
    """The run with the best `score`; None if no run has it.

    Args:
        results: run -> score -> value.
    """
    values = {run: scores[score] for run, scores in results.items() if not math.isnan(scores.get(score, math.nan))}
    return (min if lower_is_better(score) else max)(values, key=values.__getitem__, default=None)


def short_names(keys: Sequence[str]) -> list[str]:
    """The last parts of dotted keys, as few as tell them apart: "model.optimizer.lr" -> "lr". A key that another one
    ends with, as "data.seed" does with "seed", stays whole.
    """

    def ending(key: str, parts: int) -> str:
        return ".".join(key.split(".")[-parts:])

    names = []
    for key in keys:
        lengths = range(1, key.count(".") + 2)
        short = (ending(key, n) for n in lengths if [ending(k, n) for k in keys].count(ending(key, n)) == 1)
        names.append(next(short, key))
    return names


def setting_cell(value: Any) -> str:
    """A setting for readers: null is the default of a constructor, what only the launch could resolve is its own name,
    and Optuna draws numbers of 17 digits.
    """
    text = "default" if value is None else re.sub(r"\$\{(?:[\w.]+:)?([^{}]*)\}", r"\1", str(value))
    return f"{float(text):.4g}" if re.fullmatch(r"\d+\.\d{5,}(e-?\d+)?", text) else text


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


def difference_table(first: Run, second: Run) -> Table:
    """The scores of two runs with intervals, their differences, and whether these are more than noise."""
    runs = first, second
    rows: list[list[str]] = []
    best: list[tuple[int, int]] = []
    for heading, scores in _by_data(runs).items():
        rows.append([heading])
        for score in scores:
            row = [_own_name(runs, score)]
            for run in runs:
                row += [run.cell(score), run.interval(score)]
            if score in first.results and score in second.results:
                found = compared(first, second, score)
                row += [*found.cells, found.verdict]
                best += [(len(rows), (1, 3)[found.better])] if found.better is not None else []
            else:
                row += ["", "", "", ""]
            rows.append(row)
    names = run_names(runs)
    header = ["", names[0], INTERVAL, names[1], INTERVAL, "difference", INTERVAL, "p", ""]
    return Table("scores", header, rows, DIFFERENCES_NOTE, best)


def seed_tables(runs: Sequence[Run]) -> list[Table]:
    """Means and standard deviations of runs that differ in their seed alone; none if no two do."""
    varied = differences(runs)
    if "seed" not in varied:
        return []
    groups: dict[tuple[str, ...], list[int]] = {}
    for i in range(len(runs)):
        groups.setdefault(tuple(setting_cell(v[i]) for key, v in varied.items() if key != "seed"), []).append(i)
    several = {settings: members for settings, members in groups.items() if len(members) > 1}
    if not several:
        return []
    keys = short_names([key for key in varied if key != "seed"])
    header = [""]
    columns: list[list[Run]] = []
    for settings, places in several.items():
        words = [f"{key}={value}" for key, value in zip(keys, settings, strict=True)] if len(groups) > 1 else []
        header.append(", ".join([*words, f"{len(places)} seeds"]))
        columns.append([runs[i] for i in places])
    rows = []
    for score in dict.fromkeys(score for run in runs for score in run.results):
        row = [_full_name(score)]
        images = runs[0].images(score)
        for members in columns:
            values = np.array([run.results[score] for run in members if score in run.results])
            comparable = len(values) > 1 and same_data(members, score)
            with np.errstate(invalid="ignore"):  # a score may be infinite
                text = spread_cell(score, values.mean(), values.std(ddof=1), images) if comparable else ""
            row.append(f"{text} ({len(values)} seeds)" if text and len(values) < len(members) else text)
        rows.append(row)
    return [Table("seeds", header, rows, "Mean ± standard deviation of a run over the seeds.")]


def _full_name(score: str) -> str:
    return f"{data_name(score.rpartition('/')[0])} {score_name(score)}"


def _grouped(rows: Mapping[str, list[str]]) -> list[list[str]]:
    """Rows of scores, under the names of their groups if there are several."""
    groups: dict[str, list[list[str]]] = {}
    for score, row in rows.items():
        groups.setdefault(_group_of(score), []).append(row)
    if len(groups) == 1:
        return list(rows.values())
    return [row for name, members in groups.items() for row in ([name], *members)]


def _group_of(score: str) -> str:
    for group, starts in GROUPS.items():
        if f"{score}/".startswith(starts):
            return group
    declared = extensions.scores().get(score.rpartition("/")[2])
    if declared is not None:
        return declared.group
    return "classification" if score.endswith("_accuracy") else "captions"
