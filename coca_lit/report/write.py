"""From run folders to report files."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from coca_lit.files import atomic_write
from coca_lit.report import html
from coca_lit.report.figures import comparison_figure, curves_figure
from coca_lit.report.objective import best_run, headline
from coca_lit.report.run import Run, find_runs, read_run
from coca_lit.report.tables import Table, cell, comparison_tables, headlines, score_tables

FACTS = {  # key of the config or the environment -> how a reader knows it
    "command": "command",
    "checkpoint": "checkpoint",
    "model.net.name": "model",
    "data._target_": "data",
    "data.batch_size": "batch size",
    "trainer.max_epochs": "epochs",
    "seed": "seed",
    "scoring.split": "scored split",
    "scoring.images": "scored images, at most",
    "seconds": "seconds in all",
    "commit": "commit",
    "machine": "machine",
    "torch": "torch",
}

# Fewer images are easier to tell apart, so recall often falls from the last but one point to the last.
CURVES_NOTE = "Scores during training are of the first few images only; the last point is of all of them."


def write_report(folder: Path) -> Path:
    """Writes report.html, report.md and curves.png (if there are curves) into a run folder; returns the page's path."""
    run = read_run(folder)
    tables = score_tables(run)
    curves = curves_figure(run.curves)
    sheets = sorted((folder / "samples").glob("*.png"))
    if curves is not None:
        (folder / "curves.png").write_bytes(curves)
    sections = [
        html.facts(_facts(run)),
        html.tiles(headlines(run)),
        html.tables(tables),
        html.not_run(run.not_run),
        html.figure("curves", curves, CURVES_NOTE),
        *(html.figure(path.stem, path.read_bytes()) for path in sheets if path.stem not in run.captions),
        *(html.captions(name, samples) for name, samples in run.captions.items()),
        *(html.attention(name, samples) for name, samples in run.attention.items()),
        *(html.retrieval(name, samples) for name, samples in run.retrieval.items()),
    ]
    pictures = [
        *(["curves.png"] if curves is not None else []),
        *(path.relative_to(folder).as_posix() for path in sheets),
    ]
    return _write(folder, run.name, sections, tables, _facts(run), run.not_run, pictures)


def write_comparison(folders: Sequence[Path], output: Path, objective: str | None = None) -> Path:
    """Writes a report that sets runs, or those of a sweep's folder, side by side; returns the page's path.

    Args:
        objective: the score by which one of them is the best; None: the first headline score.
    """
    runs = find_runs(folders)
    score = objective or headline(list(dict.fromkeys(name for run in runs for name in run.results)))
    facts = _best(runs, score) if score else {}
    tables = [table for table in comparison_tables(runs) if table.rows]
    figure = comparison_figure(runs, score)
    output.mkdir(parents=True, exist_ok=True)
    if figure is not None:
        (output / "comparison.png").write_bytes(figure)
    sections = [html.facts(facts), html.tables(tables), html.figure("comparison", figure)]
    pictures = ["comparison.png"] if figure is not None else []
    return _write(output, f"{len(runs)} runs", sections, tables, facts, {}, pictures)


def _write(
    folder: Path,
    title: str,
    sections: Sequence[str],
    tables: Sequence[Table],
    facts: Mapping[str, str],
    not_run: Mapping[str, str],
    pictures: Sequence[str],
) -> Path:
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in facts.items())]
    for table in tables:
        lines += ["", f"## {table.title}", "", _row(table.header), _row("---" for _ in table.header)]
        lines += [
            _row(row) if len(row) > 1 else _row([f"**{row[0]}**", *[""] * (len(table.header) - 1)])
            for row in table.rows
        ]
        lines += ["", table.note] if table.note else []
    lines += ["", "## not run", "", *(f"- {name}: {reason}" for name, reason in not_run.items())] if not_run else []
    lines += [line for path in pictures for line in ("", f"![{path}]({path})")]
    (folder / "report.md").write_text("\n".join(lines) + "\n")
    atomic_write(folder / "report.html", html.page(title, sections).encode())
    return folder / "report.html"


def _best(runs: Sequence[Run], score: str) -> dict[str, str]:
    results = {run.name: run.results for run in runs}
    best = best_run(results, score)
    return {f"best {score}": f"{cell(score, results[best][score])} ({best})"} if best is not None else {}


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _facts(run: Run) -> dict[str, str]:
    known = {**run.environment, **run.config}
    return {name: str(known[key]).rpartition(".data.")[2] for key, name in FACTS.items() if known.get(key) is not None}
