"""What is printed: the headline scores of a run, or of two runs with the verdict of the paired test; and at the end of
a sweep a table of its jobs, beside `results.csv` and a page, and the best run.
"""

import csv
import io
import math
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from coca_lit.files import atomic_write, spreadsheet_text
from coca_lit.reading import printable
from coca_lit.runs.scores import RERANKED, aligned, cell, headline, headlines, own_scores, score_name
from coca_lit.tools.report.page import write_comparison
from coca_lit.tools.report.runs import RESULTS, Run, read_run, same_data
from coca_lit.tools.report.tables import (
    APART,
    HEADLINES_OF_A_SWEEP,
    best_run,
    compared,
    headline_cells,
    not_comparable,
    published_scores,
    run_names,
    runs_table,
    setting_cell,
    short_names,
    with_images,
)

WIDTH = 80
PUBLISHED = ", published"  # after the name of a score


def summary(runs: Sequence[Run], failed: Collection[str] = (), objective: str | None = None) -> str:
    """The lines to print.

    Args:
        failed: names of jobs without results.
        objective: score that comes first.
    """
    if len(runs) == 1 and not failed:
        lines = aligned([[name, value, interval, data] for value, interval, name, data in headline_cells(runs[0])])
    elif len(runs) == 2 and not failed:
        lines = [*_two(runs[0], runs[1], objective)]
    else:
        table = runs_table(runs, failed, objective)
        rows = [[*map(str, row)] for row in (table.header, *table.rows)]
        # Of the columns that would not fit, those of the first score stay.
        lines = aligned(_fitting(rows, table.header.index("status") + 2, WIDTH))
        lines += [table.note] if table.note else []
        lines += [f"{name}: {APART}: {reason}" for name, reason in not_comparable(runs).items()]
    return "\n".join(printable(line) for line in lines)


def _two(first: Run, second: Run, objective: str | None) -> Iterator[str]:
    names = run_names([first, second])
    yield f"first: {names[0]}"
    yield f"second: {names[1]}"
    shared = [score for score in first.results if score in second.results]
    chosen = [score for score in headlines(shared) if f"/{RERANKED}" not in score and score.count("/") == 1]
    chosen = chosen or own_scores(shared)
    by_data: dict[str, list[str]] = {}
    for score in dict.fromkeys([*([objective] if objective in shared else []), *chosen]):
        by_data.setdefault(with_images([first, second], score), []).append(score)
    if not by_data:
        yield "they have no headline score in common"
    for data, scores in by_data.items():
        yield from ("", data)
        rows: list[list[str]] = []
        reasons: list[str] = []
        for score in scores:
            found = compared(first, second, score)
            change, _, p = found.cells
            verdict = found.verdict if found.better is None else f"{('first', 'second')[found.better]} is better"
            values = [first.cell(score), second.cell(score)]
            rows.append([f"  {score_name(score)}", *values, change, p and f"p {p}", verdict])
            reasons += [found.why_not] if found.why_not else []
        yield from aligned(rows)
        yield from (f"  {APART}: {reason}" for reason in dict.fromkeys(reasons))


def _fitting(rows: Sequence[Sequence[str]], least: int, width: float) -> list[Sequence[str]]:
    """As many columns as fit, but the first `least` in any case."""
    shown = least
    while shown < len(rows[0]) and max(map(len, aligned([row[: shown + 1] for row in rows]))) <= width:
        shown += 1
    return [row[:shown] for row in rows]


def report_sweep(folder: Path, rows: Sequence[Mapping[str, Any]], objective: str | None) -> None:
    """Reports the jobs of a sweep in its folder.

    Args:
        rows: see `print_jobs`.
        objective: the score that ranks them; None for the first headline score.
    """
    columns = dict.fromkeys(key for row in rows for key in row)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, sorted(columns, key=lambda name: name == "error"))  # which comes last
    writer.writeheader()
    for row in rows:
        writer.writerow({name: spreadsheet_text(value) for name, value in row.items()})
    atomic_write(folder / "results.csv", table.getvalue().encode(errors="backslashreplace"))
    ok = [row for row in rows if row["status"] == "ok"]
    scores = {row["job"]: {name: value for name, value in row.items() if isinstance(value, float)} for row in ok}
    score = objective or headline(list(dict.fromkeys(name for job in scores.values() for name in job)))
    scored = [job for job in scores if (folder / job / RESULTS).exists()]
    runs = [read_run(folder / job) for job in scored]
    images = {name: of.images for run in runs for name, of in run.conditions.items()}
    known = {job: dict[str, float]() for job in scored}
    for name in dict.fromkeys(name for job in scored for name in scores[job]):
        for job, value in zip(scored, published_scores(runs, name)[0], strict=True):
            known[job] |= {} if math.isnan(value) else {f"{name}{PUBLISHED}": value}
    print_jobs([{**row, **known.get(row["job"], {})} for row in rows], str(folder), score, images)
    if score is None and any(scores.values()):
        first = next(name for job in scores.values() for name in job)
        print(printable(f"no score is a headline score: scoring.objective={first} names the best run by that one"))
    elif score is not None and not same_data(runs, score):
        print(f"the jobs were scored on different data, so none is the best by {score}")
    elif score is not None and (best := best_run(scores, score)) is not None:
        print(f"best {score}: {cell(score, scores[best][score], images.get(score))} in {folder / best}")
    if scored:
        failed = {row["job"]: row.get("error") or row["status"] for row in rows if row["status"] != "ok"}
        print(f"compared in {write_comparison(runs, failed, folder, score)}")


def print_jobs(
    rows: Sequence[Mapping[str, Any]],
    title: str,
    objective: str | None,
    images: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Prints the jobs of a sweep: varied settings, status, objective and four headline scores, or else the first
    scores, as many as fit the terminal; below, a line for each failed job. Outside a terminal nothing is cut.

    Args:
        rows: of each job: "job", its overrides (str), "status", its scores (float), and "error" if it failed.
        images: score -> on how many images it was computed.
    """
    own = ("job", "status", "error")
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, str) and key not in own)
    varied = [key for key in keys if len({row.get(key) for row in rows}) > 1] or ["job"]
    found = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, float))
    first = [objective] if objective in found else []
    others = own_scores([name for name in found if not name.endswith(PUBLISHED)])
    scores = list(dict.fromkeys([*first, *(headlines(found)[:HEADLINES_OF_A_SWEEP] or others)]))
    columns = [name for s in scores for name in (s, f"{s}{PUBLISHED}") if name == s or name in found]
    lines = [[*short_names(varied), "status", *columns]]
    for row in rows:
        settings = [setting_cell(row.get(key, "")) for key in varied]
        cells = [cell(name.removesuffix(PUBLISHED), row.get(name), images.get(name)) for name in columns]
        lines.append([*settings, row["status"], *cells])
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
    shown = _fitting([[*map(printable, line)] for line in lines], len(varied) + 2, width)
    print(title, *aligned(shown), sep="\n")
    left_out = lines[0][len(shown[0]) :]
    if left_out:
        print(f"results.csv has also {', '.join(map(printable, left_out))}")
    for line, row in zip(lines[1:], rows, strict=True):
        if row["status"] != "ok":
            job = ", ".join(f"{name}={value}" for name, value in zip(lines[0], line[: len(varied)], strict=False))
            print(printable(f"{row['status']}: {job}: {' '.join(str(row.get('error') or 'no reason given').split())}"))
