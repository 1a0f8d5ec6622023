"""The report as `report.html`, one page that opens from disk without scripts or other files, and as `report.md`."""

import base64
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from coca_lit.files import atomic_write
from coca_lit.runs.scores import cell, data_name, headline, score_name
from coca_lit.tools.report.figures import comparison_figure, curves_figures, curves_of_runs, side_by_side
from coca_lit.tools.report.runs import Run, obstacles, read_run
from coca_lit.tools.report.tables import (
    APART,
    Table,
    all_scores,
    best_run,
    code,
    headline_cells,
    markdown,
    not_comparable,
    one_line,
    plain,
    run_names,
    runs_table,
    score_tables,
    seed_tables,
    settings_table,
)

FACTS = {  # key of the config or the environment -> name for readers
    "checkpoint": "checkpoint",
    "model.net.name": "model",
    "data": "training data",
    "data.batch_size": "batch size",
    "trainer.max_epochs": "epochs",
    "seed": "seed",
    "scoring.split": "evaluation split asked for",
    "scoring.images": "evaluated images, at most",
    "seconds": "time",
    "commit": "commit",
    "machine": "machine",
    "torch": "torch",
}
DATA_MODULES = {  # of which the config has no folder -> name for readers
    "ScenesDataModule": "scenes",
    "LAIONDataModule": "image-text shards",
}
CURVES = "curves.png"
COMPARISON = "comparison.png"
LINKS = ("checkpoints/last.ckpt", "checkpoints/best.ckpt")
PARTS = re.compile(r"[^\W\d_]+|\d")  # of a word, alike in "t-shirt" and in "t - shirt", in "10" and in "1 0"
MANY = 5  # runs, whose captions are too many for a card
ASSETS = Path(__file__).parents[2] / "assets"
Card = list[tuple[str, dict[str, Any]]]  # the runs and what each wrote about one image, as `SAMPLES` has it


@dataclass
class Page:
    """What a page shows, in this order, as far as there is any.

    Attributes:
        tiles: value, interval, name and data set of scores.
        best: facts that stand first.
        reasons: heading -> name -> why it is missing.
        figures, curves, sheets: title -> PNG; sheets are folded, as all that follows.
        pictures: files beside the page that show figures and curves, for Markdown.
        captions, worst: data set -> cards.
        samples: the other kinds of `SAMPLES` -> data set -> content.
        facts, links: about the run, and files beside the page.
    """

    title: str
    tables: list[Table]
    tiles: Sequence[tuple[str, str, str, str]] = ()
    best: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    figures: Mapping[str, bytes] = field(default_factory=dict)
    curves: Mapping[str, bytes] = field(default_factory=dict)
    pictures: Sequence[str] = ()
    captions: Mapping[str, Sequence[Card]] = field(default_factory=dict)
    worst: Mapping[str, Sequence[Card]] = field(default_factory=dict)
    sheets: Mapping[str, bytes] = field(default_factory=dict)
    samples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: list[Table] = field(default_factory=list)
    command: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    links: Sequence[str] = ()


def write_report(folder: Path) -> Path:
    """Writes report.html, report.md and curves.png (if there are curves) into a run folder; returns the page's path.

    Raises:
        DataError: the run has no results, or a file that no run writes.
    """
    run = read_run(folder)
    curves = curves_figures(run.curves)
    if curves:
        atomic_write(folder / CURVES, side_by_side(list(curves.values())))
    experiment = run.environment.get("experiment", "evaluation" if "checkpoint" in run.config else "")
    samples = dict(run.samples)
    captions = samples.pop("captions")
    # Of few photos, all are shown above.
    worst = {name: rows for name, rows in samples.pop("worst").items() if any(s not in captions[name] for s in rows)}
    shown = {*captions, *(f"{name}_retrieval" for name in samples["retrieval"])}  # with more than the sheets have
    page = Page(
        title=f"{experiment}: {run.name}" if experiment not in ("", run.name) else run.name,
        tiles=headline_cells(run),
        tables=score_tables(run),
        reasons={"not run": run.not_run},
        curves=curves,
        pictures=[*([CURVES] if curves else []), *(f"samples/{name}.png" for name in sorted(run.sheets))],
        captions={name: _cards(rows) for name, rows in captions.items()},
        worst={name: _cards(rows) for name, rows in worst.items()},
        sheets={name: sheet for name, sheet in run.sheets.items() if name not in shown},
        samples=samples,
        command=run.environment.get("command", ""),
        facts=_facts(run),
        links=[link for link in LINKS if (folder / link).exists()],
    )
    return _write(folder, page)


def write_comparison(
    runs: Sequence[Run], failed: Mapping[str, str], output: Path, objective: str | None = None
) -> Path:
    """Writes a report that compares runs, or the jobs of a sweep; returns the page's path.

    Args:
        runs, failed: see `coca_lit.tools.report.runs.find_runs`.
        objective: the score that decides which run is the best; None takes the first headline score.
    """
    score = objective or headline(dict.fromkeys(name for run in runs for name in run.results))
    overview = [runs_table(runs, failed, score)] if len(runs) + len(failed) > 2 else []
    figure = comparison_figure(runs)
    if figure is not None:
        atomic_write(output / COMPARISON, figure)
    several = f"{len(runs)} runs in {Path(os.path.abspath(output)).name}"
    page = Page(
        title=" and ".join(run.name for run in runs) if len(runs) == 2 else several,
        best=_best(runs, score),
        tables=[*overview, all_scores(runs), *seed_tables(runs)],
        reasons={"failed": failed, APART: not_comparable(runs)},
        figures={"comparison": figure} if figure is not None else {},
        curves=curves_of_runs(runs),
        pictures=[COMPARISON] if figure is not None else [],
        captions=_captions_of_runs(runs),
        settings=[settings_table(runs)],
    )
    return _write(output, page)


def _best(runs: Sequence[Run], score: str | None) -> dict[str, str]:
    """The best of several runs by a score, as a fact; none if the scores cannot be compared. Of two runs the table has
    the verdict.
    """
    results = {run.name: run.results for run in runs}
    best = best_run(results, score) if score and len(runs) > 2 and not any(obstacles(runs, score)) else None
    if score is None or best is None:
        return {}
    value = cell(score, results[best][score], runs[0].images(score))
    return {f"best {data_name(score.rpartition('/')[0])} {score_name(score)}": f"{value} ({best})"}


def _facts(run: Run) -> dict[str, str]:
    known = {**run.config, **run.environment}
    target = run.config.get("data._target_")
    if target:
        module = str(target).rpartition(".")[2]
        place = re.search(r"(\w+)\W*$", str(run.config.get("data.root") or ""))  # also of "${roots.flickr8k}"
        known["data"] = data_name(place[1] if place else DATA_MODULES.get(module, module.removesuffix("DataModule")))
    sizes = run.environment.get("parameters")
    if sizes:
        size = f"{sum(sizes.values()) / 1e6:,.1f} M parameters"
        known["model.net.name"] = f"{known.get('model.net.name', '')} {size}".strip()
    if "seconds" in run.environment:
        known["seconds"] = str(timedelta(seconds=run.environment["seconds"]))
    return {name: str(known[key]) for key, name in FACTS.items() if known.get(key) is not None}


def _cards(samples: Sequence[dict[str, Any]]) -> list[Card]:
    return [[("", sample)] for sample in samples]


def _captions_of_runs(runs: Sequence[Run]) -> dict[str, list[Card]]:
    """What the runs write about the same images, by data set; nothing of other images, or of many runs."""
    first, *others = runs
    found: dict[str, list[Card]] = {}
    for name, samples in first.samples["captions"].items() if 0 < len(others) < MANY else ():
        for sample in samples:
            same = [sample]
            for run in others:
                own = run.samples["captions"].get(name, [])
                same += [s for s in own if (s["image"], s["references"]) == (sample["image"], sample["references"])][:1]
            if len(same) == len(runs):
                found.setdefault(name, []).append(list(zip(run_names(runs), same, strict=True)))
    return found


def _write(folder: Path, page: Page) -> Path:
    """Writes page and Markdown from their templates."""
    html = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html.filters |= {"anchor": _anchor, "data_name": data_name, "picture": _picture, "words": _words}
    style = Markup((ASSETS / "report.css").read_text(encoding="utf-8"))
    text = html.overlay(autoescape=False, finalize=None)  # its filters escape what is text
    text.filters = {**html.filters, "plain": plain, "code": code, "quote": quote, "markdown": markdown}
    lines = text.get_template("report.md.jinja").render(page=page)
    atomic_write(folder / "report.md", lines.encode())
    content = html.get_template("report.html.jinja").render(page=page, style=style)
    atomic_write(folder / "report.html", content.encode())
    return folder / "report.html"


def _shown(value: Any) -> Any:
    """Text from anywhere on one line, without control characters; the template escapes it."""
    return one_line(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title)


def _picture(source: str | bytes) -> str:
    """The address of a picture within the page; a stranger's run folder could name anything else."""
    if isinstance(source, bytes):
        return f"data:image/png;base64,{base64.b64encode(source).decode()}"
    return source if source.startswith("data:image/") else ""


def _words(sample: Mapping[str, Any]) -> list[tuple[str, bool]]:
    return unlike(sample["caption"], sample["references"]) or [("(empty)", True)]


def unlike(caption: str, references: Sequence[str]) -> list[tuple[str, bool]]:
    """The words of a caption, each with whether it is unlike all references: none has the word, or none has it beside
    one of its neighbours here. Case and punctuation do not count.
    """
    known = [PARTS.findall(text.lower()) for text in references]
    words = {word for text in known for word in text}
    pairs = {pair for text in known for pair in pairwise(text)}
    shown = caption.split()
    own = [(part, i) for i, word in enumerate(shown) for part in PARTS.findall(word.lower())]
    fits = [(one, other) in pairs for (one, _), (other, _) in pairwise(own)]
    odd = {
        i
        for n, (part, i) in enumerate(own)
        if part not in words or (len(own) > 1 and not any(fits[max(n - 1, 0) : n + 1]))
    }
    return [(word, i in odd) for i, word in enumerate(shown)]
