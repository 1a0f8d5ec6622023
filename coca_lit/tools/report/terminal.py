"""What is printed: the headline scores of a run, of two runs with the verdict of the paired test, or a table of all;
and at the end of a sweep such a table of its jobs and the best one, beside `results.csv` and a page.
"""

import csv
import io
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from coca_lit.files import atomic_write, spreadsheet_text
from coca_lit.reading import printable
from coca_lit.runs.scores import aligned, headline, headlines_of, own_scores
from coca_lit.tools.report.page import write_comparison
from coca_lit.tools.report.runs import RESULTS, Run, read_run, same_data
from coca_lit.tools.report.tables import (
    APART,
    all_scores,
    best_run,
    headline_cells,
    not_comparable,
    runs_table,
)

WITHOUT_INTERVALS = (0, 1, 3, 5, 7, 8)  # columns of `all_scores` of two runs


def summary(runs: Sequence[Run], failed: Mapping[str, str], objective: str | None = None) -> str:
    """The lines to print.

    Args:
        failed: jobs without results -> why they have none.
        objective: score that comes first.
    """
    if len(runs) == 1 and not failed:
        lines = aligned([[name, value, interval, data] for value, interval, name, data in headline_cells(runs[0])])
    elif len(runs) == 2 and not failed:
        lines = [*_two(runs[0], runs[1], objective)]
    else:
        return table_of(runs, failed, objective)
    return "\n".join(map(printable, lines))


def table_of(runs: Sequence[Run], failed: Mapping[str, str], objective: str | None) -> str:
    """A line for each run, see `summary`. On a terminal as many scores as fit, but the first in any case."""
    table = runs_table(runs, [*failed], objective)
    rows = [[*map(printable, row)] for row in (table.header, *table.rows)]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
    columns = len(table.header)
    while columns > table.header.index("status") + 2 and max(map(len, aligned([r[:columns] for r in rows]))) > width:
        columns -= 1
    lines = aligned([row[:columns] for row in rows])
    lines += [table.note] if table.note else []
    lines += [f"{name}: {APART}: {reason}" for name, reason in not_comparable(runs).items()]
    lines += [f"failed: {name}: {' '.join(reason.split())}" for name, reason in failed.items()]
    return "\n".join(map(printable, lines))


def _two(first: Run, second: Run, objective: str | None) -> Iterator[str]:
    """The scores of both that say most, their difference, its p and the verdict."""
    shared = [score for score in first.results if score in second.results]
    chosen = headlines_of(shared, len(shared)) or own_scores(shared)
    scores = dict.fromkeys([*([objective] if objective in shared else []), *chosen])
    table = all_scores([first, second], scores)
    rows = [row for row in (table.header, *table.rows) if len(row) > 1]
    lines = iter(aligned([[row[column] for column in WITHOUT_INTERVALS] for row in rows]))
    yield f"  {next(lines)}" if scores else "they have no score in common"
    for row in table.rows:
        yield from ("", row[0]) if len(row) == 1 else (f"  {next(lines)}",)
    yield from (f"{name}: {APART}: {reason}" for name, reason in not_comparable([first, second], scores).items())


def report_sweep(folder: Path, rows: Sequence[Mapping[str, Any]], objective: str | None) -> None:
    """Reports the jobs of a sweep in its folder.

    Args:
        rows: of each job: "job", its overrides (str), "status", its scores (float), and "error" if it failed.
        objective: the score that ranks them; None for the first headline score.
    """
    columns = dict.fromkeys(key for row in rows for key in row)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, sorted(columns, key=lambda name: name == "error"))  # which comes last
    writer.writeheader()
    for row in rows:
        writer.writerow({name: spreadsheet_text(value) for name, value in row.items()})
    atomic_write(folder / "results.csv", table.getvalue().encode(errors="backslashreplace"))
    ended = [folder / row["job"] for row in rows if row["status"] == "ok"]
    runs = [read_run(job) for job in ended if (job / RESULTS).exists()]
    failed = {row["job"]: str(row.get("error") or row["status"]) for row in rows if row["status"] != "ok"}
    scores = {run.name: run.results for run in runs}
    score = objective or headline(dict.fromkeys(name for job in scores.values() for name in job))
    print(f"{printable(str(folder))}\n{table_of(runs, failed, score)}")
    best = best_run(scores, score) if score is not None else None
    first = next((name for job in scores.values() for name in job), None)
    if score is None and first is not None:
        print(printable(f"no score is a headline score: scoring.objective={first} names the best run by that one"))
    elif score is not None and not same_data(runs, score):
        print(f"the jobs were scored on different data, so none is the best by {score}")
    elif score is not None and best is not None:
        value = next(run.cell(score) for run in runs if run.name == best)
        print(f"best {score}: {value} in {folder / best}")
    if runs:
        print(f"compared in {write_comparison(runs, failed, folder, score)}")
