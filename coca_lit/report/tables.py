"""Tables of runs: the scores of one run beside published ones, several runs side by side, the jobs of a sweep.

A `Table` is plain text cells; `markdown` and `coca_lit.report.page` render it, `print_jobs` prints to the terminal.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from coca_lit.report.runs import Run, differences
from coca_lit.report.scores import DIRECTIONS, RERANKED, cell, headlines, score_name

PUBLISHED = Path(__file__).parents[1] / "assets" / "published.json"
GROUPS = {  # by how the names of scores begin; all others are of captions
    "retrieval": (*DIRECTIONS, RERANKED),
    "zero-shot classification": ("top", "mean_per_class"),
}


class Table(NamedTuple):
    """The first column names the rows. A row of one cell is the heading of the rows below it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def markdown(table: Table) -> str:
    """Header and rows in Markdown, without title and note."""
    width = len(table.header)
    rows = [row if len(row) > 1 or width == 1 else [f"**{row[0]}**", *[""] * (width - 1)] for row in table.rows]
    lines = [table.header, ["---"] * width, *rows]
    return "\n".join("| " + " | ".join(plain(text).replace("|", "\\|") for text in line) + " |" for line in lines)


def plain(text: str) -> str:
    """Text for Markdown that means itself: names of runs and data sets come from anywhere."""
    return re.sub(r"[\[\]`]", r"\\\g<0>", html.escape(" ".join(text.split()), quote=False))


def code(text: str) -> str:
    """Text as code in Markdown, whatever backticks it holds."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{' '.join(text.split())}{pad}{fence}"


def score_tables(run: Run) -> list[Table]:
    """One table for each data set of a run: its scores, those of each domain, and published ones of the same table."""
    published = json.loads(PUBLISHED.read_text())
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
        others = {k: v for k, v in published.get(name, {}).items() if v.keys() & set(scores)}
        note = "Published: on the test split, in OpenCLIP's result files or the CoCa paper." if others else ""
        columns |= others
        rows = {s: [score_name(s), *(cell(s, column.get(s)) for column in columns.values())] for s in scores}
        tables.append(Table(name, ["", *columns], _grouped(rows), note))
    return tables


def headline_cells(run: Run) -> list[tuple[str, str, str]]:
    """Value, name and data set of the headline scores on whole data sets."""
    chosen = [score for score in headlines(run.results) if score.count("/") == 1]
    return [(cell(score, run.results[score]), score_name(score), score.partition("/")[0]) for score in chosen]


def comparison_tables(runs: Sequence[Run]) -> list[Table]:
    """The settings in which the runs differ, and all their scores."""
    names = [run.name for run in runs]
    changed = [[key, *map(_setting, values)] for key, values in differences(runs).items()]
    scores = dict.fromkeys(score for run in runs for score in run.results)
    rows = [[f"{s.rpartition('/')[0]} {score_name(s)}", *(cell(s, run.results.get(s)) for run in runs)] for s in scores]
    return [Table("settings that differ", ["", *names], changed), Table("scores", ["", *names], rows)]


def print_jobs(rows: Sequence[Mapping[str, Any]], title: str, objective: str | None, best: str | None) -> None:
    """Prints the jobs of a sweep: varied settings, status, objective and headline scores, as many as fit the terminal;
    below, a line for each failed job. Outside a terminal nothing is cut or folded.

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
    scores = [*dict.fromkeys([*([objective] if objective in found else []), *headlines(found)])]

    def table(scores: Sequence[str]) -> TerminalTable:
        result = TerminalTable(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in [*names, "status"]:
            result.add_column(escape(name), no_wrap=True)
        for score in scores:
            result.add_column(escape(score), no_wrap=True, justify="right")
        for row in rows:
            values = [_setting(row.get(key, "")) for key in [*varied, "status"]]
            values += [f"{row[score]:.4f}" if score in row else "" for score in scores]
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
    """The last parts of dotted keys, as few as tell them apart: "model.optimizer.lr" -> "lr"."""

    def ending(key: str, parts: int) -> str:
        return ".".join(key.split(".")[-parts:])

    names = []
    for key in keys:
        lengths = range(1, key.count(".") + 2)
        names.append(next(ending(key, n) for n in lengths if [ending(k, n) for k in keys].count(ending(key, n)) == 1))
    return names


def _setting(value: Any) -> str:
    """A setting for readers: interpolations are resolved at launch, and Optuna draws numbers of 17 digits."""
    text = str(value)
    if text.startswith("${"):
        return "default"
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
