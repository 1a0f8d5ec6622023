"""Tables of runs: the scores of one run beside published ones, several runs side by side, the jobs of a sweep.

A `Table` is plain text cells; `markdown` and `coca_lit.report.page` render it, `print_jobs` prints to the terminal.
"""

import html
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from coca_lit.metrics.uncertainty import Draws, difference
from coca_lit.report.runs import Run, differences
from coca_lit.report.scores import (
    DIRECTIONS,
    RERANKED,
    STATISTICS,
    cell,
    data_name,
    headlines,
    headlines_of,
    interval_cell,
    lower_is_better,
    score_name,
    spread_cell,
)

PUBLISHED = Path(__file__).parents[1] / "assets" / "published.json"
GROUPS = {  # by how the names of scores begin; all others are of captions
    "retrieval": (*DIRECTIONS, "cut_captions", "read_tokens"),
    "retrieval re-ranked by the decoder": (RERANKED,),
    "zero-shot classification": ("top", "mean_per_class"),
}


TILES, HEADLINES_OF_A_SWEEP = 5, 4
INTERVAL = "95 % interval"
BOOTSTRAP = "Intervals: bootstrap over the images."
NOISE = "within noise"
DIFFERENCES_NOTE = (
    "Difference: the second run minus the first. Intervals and p: paired bootstrap over the images that both runs were "
    f"scored on. '{NOISE}': p is at least 0.05; of twenty scores, one falls below that by chance. Training again with "
    "another seed adds noise that these intervals do not hold."
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
    return re.sub(r"[\[\]`]", r"\\\g<0>", html.escape(" ".join(text.split()), quote=False))


def code(text: str) -> str:
    """Text as code in Markdown, backticks included."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{' '.join(text.split())}{pad}{fence}"


def score_tables(run: Run) -> list[Table]:
    """One table for each data set of a run: its scores with intervals, scores per domain, and the published ones of the
    same table; and one of the parameters.
    """
    tables = []
    for name in dict.fromkeys(key.split("/")[0] for key in run.results):
        groups = [g for g in dict.fromkeys(key.rpartition("/")[0] for key in run.results) if g.split("/")[0] == name]
        columns = {
            "this run" if group == name else group.removeprefix(f"{name}/"): {
                key.removeprefix(f"{group}/"): value
                for key, value in run.results.items()
                if key.rpartition("/")[0] == group
            }
            for group in groups
        }
        scores = list(dict.fromkeys(score for column in columns.values() for score in column))
        published, sources = _published(run, name, scores)
        columns |= published
        rows = {s: [_own_name([run], s), *(cell(s, column.get(s)) for column in columns.values())] for s in scores}
        header, notes = ["", *columns], sources
        intervals = {s: run.draws[f"{name}/{s}"].interval() for s in scores if f"{name}/{s}" in run.draws}
        if "this run" in columns and intervals:
            place = header.index("this run") + 1
            header.insert(place, INTERVAL)
            for s, row in rows.items():
                row.insert(place, interval_cell(s, intervals[s]) if s in intervals else "")
            notes = [BOOTSTRAP, *sources]
        tables.append(Table(data_name(name), header, _grouped(rows), " ".join(notes)))
    if sizes := run.environment.get("parameters"):
        published, sources = _published(run, "parameters", list(sizes))
        columns = {"this run": sizes} | published
        cells = {part: [_millions(column.get(part)) for column in columns.values()] for part in sizes}
        tables.append(Table("parameters", ["", *columns], [[k, *row] for k, row in cells.items()], " ".join(sources)))
    return tables


def _own_name(runs: Sequence[Run], score: str) -> str:
    """The name of a score; CLIPScore says whose it is if the scored models were their own judges."""
    own = score.endswith("CLIPScore") and all(run.config.get("scoring.clip_score_model") is None for run in runs)
    return f"{score_name(score)} by the model itself" if own else score_name(score)


def _published(run: Run, name: str, scores: Sequence[str]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Columns of published scores of a data set, if one of them is among `scores`, and a sentence about their sources.

    Some may stand only beside scores of the same split: they come from tables that compare models on that split.
    """
    split = run.config.get("scoring.split", run.config.get("eval_split"))
    columns: dict[str, dict[str, float]] = {}
    sources: dict[str, list[str]] = {}
    for row in json.loads(PUBLISHED.read_text()).get(name, []):
        if not row["scores"].keys() & set(scores) or (row.get("only_beside_its_split") and row["split"] != split):
            continue
        title = f"{row['name']}, {row['split']} split" if "split" in row else row["name"]
        columns[title] = row["scores"]
        sources.setdefault(row["source"], []).append(row["name"])
    origins = [f"{source} ({'; '.join(names)})" for source, names in sources.items()]
    return columns, [f"Published: {', '.join(origins)}."] if origins else []


def _millions(number: float | None) -> str:
    return "" if number is None else f"{number / 1e6:,.2f} M"


def headline_cells(run: Run) -> list[tuple[str, str, str]]:
    """Value, name and data set of the scores that say most about a run."""
    chosen = {score: run.results[score] for score in headlines_of(run.results, TILES)}
    return [(cell(s, value), score_name(s), data_name(s.partition("/")[0])) for s, value in chosen.items()]


def runs_table(runs: Sequence[Run], failed: Collection[str], objective: str | None) -> Table:
    """A line for each run: the settings in which they differ, status, objective and four headline scores.

    Args:
        failed: names of jobs without results.
    """
    varied = differences(runs)
    results = dict.fromkeys(score for run in runs for score in run.results)
    first = [objective] if objective in results else []
    scores = list(dict.fromkeys([*first, *headlines_of(results, HEADLINES_OF_A_SWEEP)]))
    header = ["", *_short_names(list(varied)), "status", *map(_full_name, scores)]
    rows = []
    names = _short_runs([*(run.name for run in runs), *failed])
    for i, (run, name) in enumerate(zip(runs, names, strict=False)):
        values = [cell(score, run.results.get(score)) for score in scores]
        rows.append([name, *(_setting(settings[i]) for settings in varied.values()), "ok", *values])
    columns = {score: header.index("status") + 1 + place for place, score in enumerate(scores)}
    best = [(row - 1, column) for s, column in columns.items() for row in _best(s, [r[column] for r in rows])]
    rows += [[name, *[""] * len(varied), "failed", *[""] * len(scores)] for name in names[len(runs) :]]
    return Table("runs", header, rows, "Bold: the best of a column." if best else "", best)


def run_names(runs: Sequence[Run]) -> list[str]:
    """Names of runs for headers and labels."""
    return _short_runs([run.name for run in runs])


def _short_runs(names: Sequence[str]) -> list[str]:
    """Jobs of a sweep are named after settings; their keys are shortened where that still tells the jobs apart:
    "model.optimizer.lr=1e-3" -> "lr=1e-3".
    """
    short = [re.sub(r"(?:\w+\.)+(\w+)=", r"\1=", name) for name in names]
    return short if len({*short}) == len(names) else [*names]


def comparison_tables(runs: Sequence[Run]) -> list[Table]:
    """The settings in which the runs differ, all their scores, the differences of two runs, and means over seeds."""
    names = run_names(runs)
    changed = [[key, *map(_setting, values)] for key, values in differences(runs).items()]
    rows: list[list[str]] = []
    best: list[tuple[int, int]] = []
    of_data: dict[str, list[str]] = {}
    for score in dict.fromkeys(score for run in runs for score in run.results):
        of_data.setdefault(score.rpartition("/")[0], []).append(score)
    for data, scores in of_data.items():
        rows.append([data_name(data)])
        for score in scores:
            row = [cell(score, run.results.get(score)) for run in runs]
            best += [(len(rows), column) for column in _best(score, row)]
            rows.append([_own_name(runs, score), *row])
    note = "Bold: the best of a row." if best else ""
    tables = [Table("settings that differ", ["", *names], changed), Table("scores", ["", *names], rows, note, best)]
    return [*tables, *([difference_table(*runs)] if len(runs) == 2 else []), *seed_tables(runs)]


def _best(score: str, cells: Sequence[str]) -> list[int]:
    """The columns, counted behind the name, with the best value as it is printed; none if all are equal, and none for a
    statistic that is neither good nor bad.
    """
    values = {column: float(text) for column, text in enumerate(cells, start=1) if text and text != "nan"}
    if len(set(values.values())) < 2 or score.endswith(STATISTICS):
        return []
    best = (min if lower_is_better(score) else max)(values.values())
    return [column for column, value in values.items() if value == best]


def difference_table(first: Run, second: Run) -> Table:
    """The scores of two runs with intervals, their differences, and whether these are more than noise."""
    rows: list[list[str]] = []
    data = None
    for score in first.results:
        if score not in second.results or score not in first.draws or score not in second.draws:
            continue
        if data != (data := score.rpartition("/")[0]):
            rows.append([data_name(data)])
        draws = first.draws[score], second.draws[score]
        row = [_own_name([first, second], score)]
        for run, own in zip((first, second), draws, strict=True):
            row += [cell(score, run.results[score]), interval_cell(score, own.interval())]
        if draws[0].units != draws[1].units:
            rows.append([*row, "", "", "", "of other images"])
            continue
        found = difference(*draws)
        change = cell(score, found.value)
        row += [change if change.startswith("-") else f"+{change}", interval_cell(score, (found.low, found.high))]
        rows.append([*row, f"{found.p:.3f}", NOISE if found.noise else ""])
    names = run_names([first, second])
    header = ["", names[0], INTERVAL, names[1], INTERVAL, "difference", INTERVAL, "p", ""]
    return Table("differences", header, rows, DIFFERENCES_NOTE)


def seed_tables(runs: Sequence[Run]) -> list[Table]:
    """Means and standard deviations of runs that differ in their seed alone; none if no two do."""
    varied = differences(runs)
    if "seed" not in varied:
        return []
    groups: dict[tuple[str, ...], list[int]] = {}
    for i in range(len(runs)):
        groups.setdefault(tuple(_setting(v[i]) for key, v in varied.items() if key != "seed"), []).append(i)
    several = {settings: members for settings, members in groups.items() if len(members) > 1}
    if not several:
        return []
    keys = _short_names([key for key in varied if key != "seed"])
    header, columns = [""], []
    for settings, members in several.items():
        words = [f"{key}={value}" for key, value in zip(keys, settings, strict=True)] if len(groups) > 1 else []
        header.append(", ".join([*words, f"{len(members)} seeds"]))
        columns.append([runs[i].results for i in members])
    rows = []
    for score in dict.fromkeys(score for run in runs for score in run.results):
        row = [_full_name(score)]
        for results in columns:
            values = [own[score] for own in results if score in own]
            row.append(spread_cell(score, fmean(values), stdev(values)) if len(values) > 1 else "")
        rows.append(row)
    return [Table("seeds", header, rows, "Mean ± standard deviation of a run over the seeds.")]


def _full_name(score: str) -> str:
    return f"{data_name(score.rpartition('/')[0])} {score_name(score)}"


def print_scores(results: Mapping[str, float], draws: Mapping[str, Draws]) -> None:
    """Prints scores in the units of papers, a column for each data set, with half of the width of their intervals."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as TerminalTable

    groups = sorted({name.rpartition("/")[0] for name in results})
    table = TerminalTable("", box=box.SIMPLE_HEAD, pad_edge=False)
    for group in groups:
        table.add_column(escape(group or "all images"), justify="right")
    for score in dict.fromkeys(name.rpartition("/")[2] for name in results):
        keys = [f"{group}/{score}" if group else score for group in groups]
        cells = [_with_half_width(key, results.get(key), draws.get(key)) for key in keys]
        table.add_row(escape(score_name(score)), *cells)
    if results:
        print("results" + (", ± half of the 95 % interval" if draws else ""))
        Console().print(table)


def _with_half_width(score: str, value: float | None, draws: Draws | None) -> str:
    if value is None or draws is None:
        return cell(score, value)
    low, high = draws.interval()
    return cell(score, value) if math.isnan(low) else spread_cell(score, value, (high - low) / 2)


def print_jobs(rows: Sequence[Mapping[str, Any]], title: str, objective: str | None, best: str | None) -> None:
    """Prints the jobs of a sweep: varied settings, status, objective and four headline scores, as many as fit the
    terminal; below, a line for each failed job. Outside a terminal nothing is cut or folded.

    Args:
        rows: of each job: "job", its overrides (str), "status", its scores (float), and "error" if it failed.
        best: the job to highlight.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as TerminalTable

    own = ("job", "status", "error")
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, str) and key not in own)
    varied = [key for key in keys if len({row.get(key) for row in rows}) > 1] or ["job"]
    names = _short_names(varied)
    found = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, float))
    first = [objective] if objective in found else []
    scores = list(dict.fromkeys([*first, *headlines(found)[:HEADLINES_OF_A_SWEEP]]))

    def table(scores: Sequence[str]) -> TerminalTable:
        result = TerminalTable(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in [*names, "status"]:
            result.add_column(escape(name), no_wrap=True)
        for score in scores:
            result.add_column(escape(score), no_wrap=True, justify="right")
        for row in rows:
            values = [_setting(row.get(key, "")) for key in [*varied, "status"]]
            values += [cell(score, row.get(score)) for score in scores]
            result.add_row(*map(escape, values), style="bold" if row["job"] == best else None)
        return result

    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)
    natural, shown = console.options.update(width=10_000), len(scores)
    while shown > 1 and console.measure(table(scores[:shown]), options=natural).maximum > console.width:
        shown -= 1
    print(title)
    console.print(table(scores[:shown]))
    if shown < len(scores):
        print(f"results.csv has also {', '.join(scores[shown:])}")
    for row in rows:
        if row["status"] != "ok":
            job = ", ".join(f"{name}={_setting(row.get(key, ''))}" for name, key in zip(names, varied, strict=True))
            print(f"{row['status']}: {job}: {' '.join(str(row.get('error') or 'no reason given').split())}")


def _short_names(keys: Sequence[str]) -> list[str]:
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


def _setting(value: Any) -> str:
    """A setting for readers: null is the default of a constructor, what only the launch could resolve is its own name,
    and Optuna draws numbers of 17 digits.
    """
    text = "default" if value is None else re.sub(r"\$\{(?:[\w.]+:)?([^{}]*)\}", r"\1", str(value))
    return f"{float(text):.4g}" if re.fullmatch(r"\d+\.\d{5,}(e-?\d+)?", text) else text


def _grouped(rows: Mapping[str, list[str]]) -> list[list[str]]:
    """Rows of scores, under the names of their groups if there are several."""
    groups: dict[str, list[list[str]]] = {}
    for score, row in rows.items():
        group = next((name for name, starts in GROUPS.items() if score.startswith(starts)), "captions")
        groups.setdefault(group, []).append(row)
    if len(groups) == 1:
        return list(rows.values())
    return [row for name, members in groups.items() for row in ([name], *members)]
