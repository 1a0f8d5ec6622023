"""The report as `report.html`, one page that opens from disk without scripts or other files, and as `report.md`."""

import base64
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from coca_lit.files import atomic_write
from coca_lit.runs.scores import cell, data_name, headline, score_name
from coca_lit.tools.report.figures import comparison_figure, curves_figures, curves_of_runs, gap_figure, side_by_side
from coca_lit.tools.report.runs import Run, obstacles, read_run
from coca_lit.tools.report.tables import (
    APART,
    PUBLISHED_SCORES,
    Table,
    all_scores,
    best_run,
    code,
    difference_table,
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
    "command": "command",
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
LINKS = ("checkpoints/last.ckpt", "checkpoints/best.ckpt")
CURVES_NOTE = (
    "Lines: scores during training, of the first few images only. Star: the score of all images at the end. Retrieval "
    "among fewer images is easier, so its line may end above its star."
)
PARTS = re.compile(r"[^\W\d_]+|\d")  # of a word, alike in "t-shirt" and in "t - shirt", in "10" and in "1 0"
MARKS_NOTE = "✓: it equals a reference. Underlined: words that no reference has, or none has there."
MANY = 5  # runs, whose captions are too many for a card
ASSETS = Path(__file__).parents[2] / "assets"
SAMPLES = {"retrieval": "retrieval", "attention": "attention", "confusion": "confused classes"}


class Section(NamedTuple):
    """A part of the page; nothing without content.

    Args:
        kind: name of the macro in `report.html.jinja` that shows the content.
        folded: pictures, which the reader unfolds.
    """

    title: str
    kind: str
    content: Any
    folded: bool = False


def write_report(folder: Path) -> Path:
    """Writes report.html, report.md and curves.png (if there are curves) into a run folder; returns the page's path.

    Raises:
        DataError: the run has no results, or a file that no run writes.
    """
    run = read_run(folder)
    tables = score_tables(run)
    curves = curves_figures(run.curves)
    facts = _facts(run)
    links = [link for link in LINKS if (folder / link).exists()]
    captions = run.samples["captions"]
    retrieval = run.samples["retrieval"]
    shown = {*captions, *(f"{name}_retrieval" for name in retrieval)}  # with more than the sheets have
    if curves:
        atomic_write(folder / CURVES, side_by_side(list(curves.values())))
    worst = run.samples["worst"]
    sections = [
        Section("", "tiles", headline_cells(run)),
        _tables(tables),
        _reasons("not run", run.not_run),
        _curves(curves, CURVES_NOTE if curves.keys() - {"losses"} else ""),
        *(_captions(name, samples, worst.get(name, [])) for name, samples in captions.items()),
        *(_figure(name, sheet, folded=True) for name, sheet in run.sheets.items() if name not in shown),
    ]
    for kind, title in SAMPLES.items():
        for name, samples in run.samples[kind].items():
            sections.append(Section(f"{data_name(name)}: {title}", kind, samples, folded=True))
    sections.append(_facts_section("about this run", facts, links))
    pictures = [CURVES] if curves else []
    pictures += [f"samples/{name}.png" for name in sorted(run.sheets)]
    experiment = run.environment.get("experiment", "evaluation" if "checkpoint" in run.config else "")
    title = f"{experiment}: {run.name}" if experiment not in ("", run.name) else run.name
    return _write(folder, title, sections, tables, facts, {"not run": run.not_run}, pictures, links)


def write_comparison(
    runs: Sequence[Run], failed: Mapping[str, str], output: Path, objective: str | None = None
) -> Path:
    """Writes a report that compares runs, or the jobs of a sweep; returns the page's path.

    Args:
        runs, failed: see `coca_lit.tools.report.runs.find_runs`.
        objective: the score that decides which run is the best; None takes the first headline score.
    """
    score = objective or headline(dict.fromkeys(name for run in runs for name in run.results))
    table = runs_table(runs, failed, score)
    overview = [table] if len(runs) + len(failed) > 2 or PUBLISHED_SCORES in table.note else []
    compared = difference_table(*runs) if len(runs) == 2 else all_scores(runs)
    scores = [table for table in (compared, *seed_tables(runs)) if table.rows]
    settings = settings_table(runs)
    apart = not_comparable(runs)
    drawn = {"comparison": comparison_figure(runs, score), "zero-shot gaps": gap_figure(runs)}
    figures = {title: figure for title, figure in drawn.items() if figure is not None}
    pictures = {title: f"{title.replace(' ', '_')}.png" for title in figures}
    for title, figure in figures.items():
        atomic_write(output / pictures[title], figure)
    facts = _best(runs, score)
    sections = [
        _facts_section("", facts),
        _tables(overview),
        _reasons("failed", failed),
        _tables(scores),
        _reasons(APART, apart),
        *(_figure(title, figure) for title, figure in figures.items()),
        _curves(curves_of_runs(runs), "Scores during training are of the first few images."),
        *_side_by_side(runs),
        _tables([settings]),
    ]
    several = f"{len(runs)} runs in {Path(os.path.abspath(output)).name}"
    title = " and ".join(run.name for run in runs) if len(runs) == 2 else several
    tables = [*overview, *scores, *([settings] if settings.rows else [])]
    return _write(output, title, sections, tables, facts, {"failed": failed, APART: apart}, list(pictures.values()))


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


def _write(
    folder: Path,
    title: str,
    sections: Sequence[Section],
    tables: Sequence[Table],
    facts: Mapping[str, str],
    reasons: Mapping[str, Mapping[str, str]],
    pictures: Sequence[str],
    links: Sequence[str] = (),
) -> Path:
    """Writes page and Markdown; `reasons` are lists of names with reasons, by heading."""
    lines = [f"# {plain(title)}", ""]
    lines += [f"- {plain(key)}: {code(value) if key == 'command' else plain(value)}" for key, value in facts.items()]
    lines += [f"- [{Path(link).name}]({quote(link)})" for link in links]
    for table in tables:
        lines += ["", f"## {plain(table.title)}", "", markdown(table, literal=True)]
        lines += ["", plain(table.note)] if table.note else []
    for heading, items in reasons.items():
        lines += ["", f"## {heading}", ""] if items else []
        lines += [f"- {plain(name)}: {plain(why)}" for name, why in items.items()]
    lines += [line for path in pictures for line in ("", f"![{plain(path)}]({quote(path)})")]
    atomic_write(folder / "report.md", ("\n".join(lines) + "\n").encode())
    atomic_write(folder / "report.html", _render(title, [part for part in sections if part.content]).encode())
    return folder / "report.html"


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


# HTML


def _contents(sections: Sequence[Section]) -> list[str]:
    """The headings of the page, of each table its own."""
    titles: list[str] = []
    for section in sections:
        titles += [table.title for table in section.content] if section.kind == "tables" else [section.title]
    return [title for title in titles if title]


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title)


def _picture(source: str) -> str:
    """Of a picture within the page; a stranger's run folder could name anything else."""
    return source if source.startswith("data:image/") else ""


def _words(sample: Mapping[str, Any]) -> list[tuple[str, bool]]:
    return unlike(sample["caption"], sample["references"]) or [("(empty)", True)]


def _shown(value: Any) -> Any:
    """Text from anywhere on one line, without control characters; the template escapes it."""
    return one_line(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _render(title: str, sections: Sequence[Section]) -> str:
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"anchor": _anchor, "contents": _contents, "picture": _picture, "words": _words}
    style = Markup((ASSETS / "report.css").read_text(encoding="utf-8"))
    template = environment.get_template("report.html.jinja")
    return template.render(title=title, sections=sections, style=style, marks_note=MARKS_NOTE).lstrip()


def _tables(contents: Iterable[Table]) -> Section:
    """Tables side by side, as many as fit."""
    return Section("", "tables", [table for table in contents if table.rows])


def _facts_section(title: str, facts: Mapping[str, str], links: Sequence[str] = ()) -> Section:
    """Facts about the run, below its command, with links to files beside the page."""
    pairs = {key: value for key, value in facts.items() if key != "command"}
    content = {"command": facts.get("command"), "pairs": pairs, "links": links}
    return Section(title, "facts", content if facts or links else {})


def _reasons(title: str, reasons: Mapping[str, str]) -> Section:
    """Names with the reasons why they are missing; the same reason often applies to several."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return Section(title, "reasons", names)


def _figure(title: str, png: bytes, folded: bool = False) -> Section:
    return Section(title, "figure", {"name": title, "source": _png(png)}, folded)


def _curves(panels: Mapping[str, bytes], note: str) -> Section:
    figures = {name: _png(png) for name, png in panels.items()}
    return Section("curves", "curves", {"figures": figures, "note": note} if figures else {})


def _png(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _captions(name: str, samples: Sequence[Mapping[str, Any]], worst: Sequence[Mapping[str, Any]]) -> Section:
    what = "answer" if any("question" in sample for sample in samples) else "caption"
    if all(sample in samples for sample in worst):  # of few photos, all are shown above
        worst = []
    content = {"what": what, "samples": samples, "worst": worst}
    return Section(f"{data_name(name)}: {what}s", "captions", content, folded=True)


def _side_by_side(runs: Sequence[Run]) -> list[Section]:
    """What the runs write about the same images; nothing for runs of other images."""
    first, *others = runs
    if not 0 < len(others) < MANY:
        return []
    sections = []
    for name, samples in first.samples["captions"].items():
        found = [{(s["image"], *s["references"]): s for s in run.samples["captions"].get(name, [])} for run in others]
        cards = []
        for sample in samples:
            same = [own.get((sample["image"], *sample["references"])) for own in found]
            if all(same):
                cards.append(list(zip(run_names(runs), [sample, *same], strict=True)))
        sections.append(Section(f"{data_name(name)}: captions", "side_by_side", cards, folded=True))
    return sections


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
