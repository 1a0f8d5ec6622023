"""The report as `report.html`, one page that opens from disk without scripts or other files, and as `report.md`."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from coca_lit.files import atomic_write
from coca_lit.report.figures import comparison_figure, curves_figure, gap_figure
from coca_lit.report.runs import Run, find_runs, read_run
from coca_lit.report.scores import best_run, cell, headline
from coca_lit.report.tables import Table, code, comparison_tables, headline_cells, markdown, plain, score_tables

FACTS = {  # key of the config or the environment -> name for readers
    "command": "command",
    "checkpoint": "checkpoint",
    "model.net.name": "model",
    "data._target_": "data",
    "data.batch_size": "batch size",
    "trainer.max_epochs": "epochs",
    "seed": "seed",
    "scoring.split": "evaluation split",
    "scoring.images": "evaluated images, at most",
    "eval_split": "evaluation split",  # the keys of earlier versions
    "eval_images": "evaluated images, at most",
    "seconds": "seconds in total",
    "commit": "commit",
    "machine": "machine",
    "torch": "torch",
}

# Retrieval among fewer images is easier, so recall often falls from the last but one point to the last.
CURVES_NOTE = "Scores during training are of the first few images only; the last point is of all images."
STYLE = """
:root { color-scheme: light dark; --line: #8883; --soft: #8881; --good: #2a9d5c; --bad: #8885; --accent: #3b6ea8; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1160px; margin: 2rem auto 4rem; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .5rem; }
.note, figcaption { opacity: .7; font-size: .87rem; }
.facts { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: 0 0 1.4rem; font-size: .87rem; }
.facts span { opacity: .65; }
code { font-size: .85rem; background: var(--soft); padding: .15rem .4rem; border-radius: 4px; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(138px, 1fr)); gap: .7rem; }
.tile { background: var(--soft); border-radius: 8px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { overflow-wrap: anywhere; font-size: .82rem; opacity: .75; display: block; line-height: 1.3; }
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem; align-items: flex-start; }
.tables > div { max-width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th { font-weight: 600; vertical-align: bottom; max-width: 9rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:nth-child(2) { background: var(--soft); font-weight: 600; }
tr.group td { background: none; font-size: .8rem; font-weight: 600; color: var(--accent); padding-top: .8rem; }
figure { margin: 0; }
figure img { max-width: 100%; display: block; }
figure.plot img { background: white; border-radius: 8px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .7rem; }
.card img, .query img, .answers img { width: 100%; display: block; border-radius: 4px; }
.card p { margin: .6rem 0 .3rem; line-height: 1.35; }
.card ul { margin: 0; padding: 0; list-style: none; line-height: 1.35; }
.card li { padding: .2rem 0; border-top: 1px solid var(--line); }
img.pixels { image-rendering: pixelated; }
.hit { color: var(--good); font-weight: 600; }
li.miss { opacity: .75; }
.answers { display: grid; grid-template-columns: repeat(5, 1fr); gap: .6rem; margin: .3rem 0 1.4rem; max-width: 800px; }
.answers div { border: 4px solid var(--bad); border-radius: 8px; }
.answers div.hit { border-color: var(--good); }
.query { display: grid; grid-template-columns: 150px 1fr; gap: 1rem; margin-bottom: 1.2rem; align-items: start; }
.query ol { margin: 0; }
.words { display: flex; flex-wrap: wrap; gap: .5rem; margin-bottom: 1.4rem; }
.words img { width: 96px; border-radius: 4px; }
.words figcaption { text-align: center; }
"""


def write_report(folder: Path) -> Path:
    """Writes report.html, report.md and curves.png (if there are curves) into a run folder; returns the page's path.

    Raises:
        DataError: the run has no results.
    """
    run = read_run(folder)
    tables = score_tables(run)
    curves = curves_figure(run.curves)
    sheets = sorted((folder / "samples").glob("*.png"))
    if curves is not None:
        atomic_write(folder / "curves.png", curves)
    sections = [
        _facts_html(_facts(run)),
        _tiles(headline_cells(run)),
        _tables(tables),
        _reasons("not run", run.not_run),
        _figure("curves", curves, CURVES_NOTE),
        *(_figure(path.stem, path.read_bytes()) for path in sheets if path.stem not in run.captions),
        *(_captions(name, samples) for name, samples in run.captions.items()),
        *(_attention(name, samples) for name, samples in run.attention.items()),
        *(_retrieval(name, samples) for name, samples in run.retrieval.items()),
    ]
    pictures = [
        *(["curves.png"] if curves is not None else []),
        *(path.relative_to(folder).as_posix() for path in sheets),
    ]
    return _write(folder, run.name, sections, tables, _facts(run), {"not run": run.not_run}, pictures)


def write_comparison(folders: Sequence[Path], output: Path, objective: str | None = None) -> Path:
    """Writes a report that compares runs, or the jobs in the folder of a sweep, failed ones included; returns the
    page's path.

    Args:
        objective: the score that decides which run is the best; None takes the first headline score.

    Raises:
        DataError: no run is finished.
    """
    runs, failed = find_runs(folders)
    score = objective or headline(dict.fromkeys(name for run in runs for name in run.results))
    facts = _best(runs, score) if score else {}
    tables = [table for table in comparison_tables(runs) if table.rows]
    drawn = {"comparison": comparison_figure(runs, score), "zero-shot gaps": gap_figure(runs)}
    figures = {title: figure for title, figure in drawn.items() if figure is not None}
    pictures = {title: f"{title.replace(' ', '_')}.png" for title in figures}
    output.mkdir(parents=True, exist_ok=True)
    for title, figure in figures.items():
        atomic_write(output / pictures[title], figure)
    sections = [
        _facts_html(facts),
        _tables(tables),
        _reasons("failed", failed),
        *(_figure(title, figure) for title, figure in figures.items()),
    ]
    return _write(output, f"{len(runs)} runs", sections, tables, facts, {"failed": failed}, list(pictures.values()))


def _write(
    folder: Path,
    title: str,
    sections: Sequence[str],
    tables: Sequence[Table],
    facts: Mapping[str, str],
    reasons: Mapping[str, Mapping[str, str]],
    pictures: Sequence[str],
) -> Path:
    """Writes page and Markdown; `reasons` are lists of names with reasons, by heading."""
    lines = [f"# {plain(title)}", ""]
    lines += [f"- {key}: {code(v) if key == 'command' else plain(v)}" for key, v in facts.items()]
    for table in tables:
        lines += [
            "",
            f"## {plain(table.title)}",
            "",
            markdown(table, literal=True),
            *(["", plain(table.note)] if table.note else []),
        ]
    for heading, items in reasons.items():
        listed = [f"- {plain(name)}: {plain(why)}" for name, why in items.items()]
        lines += ["", f"## {heading}", "", *listed] if items else []
    lines += [line for path in pictures for line in ("", f"![{plain(path)}]({quote(path)})")]
    atomic_write(folder / "report.md", ("\n".join(lines) + "\n").encode(errors="replace"))
    atomic_write(folder / "report.html", _page(title, sections).encode(errors="replace"))
    return folder / "report.html"


def _best(runs: Sequence[Run], score: str) -> dict[str, str]:
    results = {run.name: run.results for run in runs}
    best = best_run(results, score)
    return {f"best {score}": f"{cell(score, results[best][score])} ({best})"} if best is not None else {}


def _facts(run: Run) -> dict[str, str]:
    known = {**run.environment, **run.config}
    if target := known.get("data._target_"):
        known["data._target_"] = str(target).rpartition(".")[2]
    return {name: str(known[key]) for key, name in FACTS.items() if known.get(key) is not None}


# HTML


def _page(title: str, sections: Iterable[str]) -> str:
    body = "\n".join([f"<h1>{escape(title)}</h1>", *(section for section in sections if section)])
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _facts_html(pairs: Mapping[str, Any]) -> str:
    """A line or two about the run, below its command."""
    items = "".join(
        f"<div><span>{escape(key)}</span> {escape(str(value))}</div>"
        for key, value in pairs.items()
        if key != "command"
    )
    command = f"<p><code>{escape(str(pairs['command']))}</code></p>" if "command" in pairs else ""
    return f'{command}<div class="facts">{items}</div>'


def _tiles(contents: Iterable[tuple[str, str, str]]) -> str:
    """The headline scores, as (value, score, data set)."""
    items = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(score)}</span><span>{escape(data)}</span></div>'
        for value, score, data in contents
    )
    return f'<div class="tiles">{items}</div>'


def _tables(contents: Iterable[Table]) -> str:
    """Tables side by side, as many as fit."""
    return '<div class="tables">' + "".join(_table(content) for content in contents if content.rows) + "</div>"


def _table(content: Table) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in content.header)
    rows = "\n".join(map(_row, content.rows))
    note = f'<p class="note">{escape(content.note)}</p>' if content.note else ""
    title = f"<h2>{escape(content.title)}</h2>"
    return f'<div>{title}<div class="wide"><table><tr>{head}</tr>\n{rows}</table></div>{note}</div>'


def _row(cells: Sequence[str]) -> str:
    if len(cells) == 1:  # a heading
        return f'<tr class="group"><td colspan="99">{escape(cells[0])}</td></tr>'
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _figure(title: str, png: bytes | None, note: str = "") -> str:
    if png is None:
        return ""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    image = f'<img src="{source}" alt="{escape(title)}">'
    return f'<h2>{escape(title)}</h2><figure class="plot">{image}{caption}</figure>'


def _reasons(title: str, reasons: Mapping[str, str]) -> str:
    """A list of names with the reasons why they are missing."""
    if not reasons:
        return ""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)  # the same reason often applies to several
    items = "".join(f"<li><b>{escape(', '.join(group))}</b>: {escape(reason)}</li>" for reason, group in names.items())
    return f'<h2>{escape(title)}</h2><ul class="note">{items}</ul>'


def _captions(name: str, samples: Sequence[Mapping[str, Any]]) -> str:
    cards = "\n".join(_caption_card(sample) for sample in samples)
    what = "answer" if any("question" in sample for sample in samples) else "caption"
    note = f'<p class="note">Bold: the generated {what}, green if it equals a reference. Below it: references.</p>'
    return f'<h2>{escape(name)}: {what}s</h2>{note}<div class="cards">{cards}</div>'


def _caption_card(sample: Mapping[str, Any]) -> str:
    references = "".join(f"<li>{escape(text)}</li>" for text in sample["references"][:3])
    style = ' class="hit"' if sample["exact"] else ""
    caption = escape(sample["caption"] or "(empty)")
    question = f"{escape(sample['question'].rstrip('?'))}? " if "question" in sample else ""
    card = f'{_image(sample["image"])}<p>{question}<b{style}>{caption}</b></p><ul class="note">{references}</ul>'
    return f'<div class="card">{card}</div>'


def _attention(name: str, samples: Sequence[Mapping[str, Any]]) -> str:
    rows = "\n".join(
        f'<div class="words"><figure>{_image(sample["image"])}<figcaption>input</figcaption></figure>'
        + "".join(
            f'<figure><img src="{part["map"]}" alt=""><figcaption>{escape(part["word"])}</figcaption></figure>'
            for part in sample["words"]
        )
        + "</div>"
        for sample in samples
    )
    note = '<p class="note">Bright: the patches attended to for the word below, averaged over layers and heads.</p>'
    return f"<h2>{escape(name)}: attention</h2>{note}{rows}"


def _retrieval(name: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    to_images = "".join(
        f'<p>{escape(query["text"])}</p><div class="answers">'
        + "".join(f'<div class="{_mark(a)}">{_image(a["image"])}</div>' for a in query["answers"])
        + "</div>"
        for query in samples["text_to_image"]
    )
    to_texts = "".join(
        f'<div class="query"><div>{_image(query["image"])}</div><ol>'
        + "".join(f'<li class="{_mark(a)}">{escape(a["text"])}</li>' for a in query["answers"])
        + "</ol></div>"
        for query in samples["image_to_text"]
    )
    note = '<p class="note">The five best answers, best first; correct ones are green.</p>'
    title = f"<h2>{escape(name)}: retrieval</h2>{note}"
    return f"{title}<h3>text to image</h3>{to_images}<h3>image to text</h3>{to_texts}"


def _mark(answer: Mapping[str, Any]) -> str:
    return "hit" if answer["hit"] else "miss"


def _image(source: str) -> str:
    pixels = ' class="pixels"' if source.startswith("data:image/png") else ""  # small: not smoothed
    return f'<img src="{source}"{pixels} alt="">'
