"""The report as `report.html`, one page that opens from disk without scripts or other files, and as `report.md`."""

import base64
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from coca_lit.files import atomic_write
from coca_lit.report.figures import comparison_figure, curves_figure, gap_figure
from coca_lit.report.runs import Run, find_runs, read_run
from coca_lit.report.scores import best_run, cell, data_name, headline, score_name
from coca_lit.report.tables import (
    Table,
    code,
    comparison_tables,
    headline_cells,
    markdown,
    plain,
    runs_table,
    score_tables,
)

FACTS = {  # key of the config or the environment -> name for readers
    "command": "command",
    "checkpoint": "checkpoint",
    "model.net.name": "model",
    "data": "training data",
    "data.batch_size": "batch size",
    "trainer.max_epochs": "epochs",
    "seed": "seed",
    "scoring.split": "evaluation split",
    "scoring.images": "evaluated images, at most",
    "eval_split": "evaluation split",  # the keys of earlier versions
    "eval_images": "evaluated images, at most",
    "seconds": "time in total",
    "commit": "commit",
    "machine": "machine",
    "torch": "torch",
}
DATA_MODULES = {  # of which the config has no folder -> name for readers
    "ScenesDataModule": "scenes",
    "SceneQuestionsDataModule": "scenes_vqa",
    "LAIONDataModule": "image-text shards",
}
LINKS = ("checkpoints/last.ckpt", "checkpoints/best.ckpt")

CURVES_NOTE = (
    "Lines: scores during training, of the first few images only. Star: the score of all images at the end. Retrieval "
    "among fewer images is easier, so its line may end above its star."
)
STYLE = """
:root { color-scheme: light dark; --line: #8883; --soft: #8881; --good: #2a9d5c; --bad: #8885; --accent: #3b6ea8; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1160px; margin: 2rem auto 4rem; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .5rem; }
.note, figcaption { opacity: .7; font-size: .87rem; }
.facts { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: 0 0 1.4rem; font-size: .87rem; }
.facts div { overflow-wrap: anywhere; }
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
td:not(:first-child) { white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; max-width: 9rem; overflow-wrap: anywhere; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.own td:nth-child(2) { background: var(--soft); font-weight: 600; }
td.best { font-weight: 700; color: var(--good); }
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
.confused img { width: 56px; border-radius: 4px; }
.confused th, .confused td { text-align: left; vertical-align: middle; }
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
    shown = {*run.captions, *(f"{name}_retrieval" for name in run.retrieval)}  # with more than the sheets have
    if curves is not None:
        atomic_write(folder / "curves.png", curves)
    sections = [
        _facts_html(_facts(run), _links(run)),
        _tiles(headline_cells(run)),
        _tables(tables),
        _reasons("not run", run.not_run),
        _figure("curves", curves, CURVES_NOTE),
        *(_figure(path.stem, path.read_bytes()) for path in sheets if path.stem not in shown),
        *(_captions(name, samples, run.worst.get(name, [])) for name, samples in run.captions.items()),
        *(_attention(name, samples) for name, samples in run.attention.items()),
        *(_retrieval(name, samples) for name, samples in run.retrieval.items()),
        *(_confusion(name, samples) for name, samples in run.confusion.items()),
    ]
    pictures = [
        *(["curves.png"] if curves is not None else []),
        *(path.relative_to(folder).as_posix() for path in sheets),
    ]
    facts = _facts(run) | {link: link for link in _links(run)}
    return _write(folder, _title(run), sections, tables, facts, {"not run": run.not_run}, pictures)


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
    overview = [runs_table(runs, failed, score)] if len(runs) + len(failed) > 2 else []
    tables = [table for table in [*overview, *comparison_tables(runs)] if table.rows]
    drawn = {"comparison": comparison_figure(runs, score), "zero-shot gaps": gap_figure(runs)}
    figures = {title: figure for title, figure in drawn.items() if figure is not None}
    pictures = {title: f"{title.replace(' ', '_')}.png" for title in figures}
    output.mkdir(parents=True, exist_ok=True)
    for title, figure in figures.items():
        atomic_write(output / pictures[title], figure)
    sections = [
        _facts_html(facts),
        _tables(overview),
        _reasons("failed", failed),
        _tables(tables[len(overview) :]),
        *(_figure(title, figure) for title, figure in figures.items()),
    ]
    title = " and ".join(run.name for run in runs) if len(runs) == 2 else f"{len(runs)} runs in {output.name}"
    return _write(output, title, sections, tables, facts, {"failed": failed}, list(pictures.values()))


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
    lines += [f"- {key}: {code(v) if key == 'command' else plain(v)}" for key, v in facts.items() if key not in LINKS]
    lines += [f"- [{Path(link).name}]({quote(link)})" for link in facts if link in LINKS]
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
    name = f"best {data_name(score.rpartition('/')[0])} {score_name(score)}"
    return {name: f"{cell(score, results[best][score])} ({best})"} if best is not None else {}


def _title(run: Run) -> str:
    experiment = run.environment.get("experiment", "evaluation" if "checkpoint" in run.config else None)
    return f"{experiment}: {run.name}" if experiment and experiment != run.name else run.name


def _facts(run: Run) -> dict[str, str]:
    known = {**run.environment, **run.config}
    if target := known.get("data._target_"):
        module = str(target).rpartition(".")[2]
        place = re.fullmatch(r"(?:.*/)?(\w+)/?", str(known.get("data.root") or ""))
        known["data"] = data_name(place[1] if place else DATA_MODULES.get(module, module.removesuffix("DataModule")))
    if sizes := known.get("parameters"):
        size = f"{sum(sizes.values()) / 1e6:,.1f} M parameters"
        known["model.net.name"] = f"{known.get('model.net.name', '')} {size}".strip()
    if "seconds" in known:
        known["seconds"] = str(timedelta(seconds=known["seconds"]))
    return {name: str(known[key]) for key, name in FACTS.items() if known.get(key) is not None}


def _links(run: Run) -> list[str]:
    return [link for link in LINKS if (run.folder / link).exists()]


# HTML


def _page(title: str, sections: Iterable[str]) -> str:
    body = "\n".join([f"<h1>{escape(title)}</h1>", *(section for section in sections if section)])
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _facts_html(pairs: Mapping[str, Any], links: Sequence[str] = ()) -> str:
    """A line or two about the run, below its command, with links to files beside the page."""
    items = "".join(
        f"<div><span>{escape(key)}</span> {escape(str(value))}</div>"
        for key, value in pairs.items()
        if key != "command"
    )
    items += "".join(f'<div><a href="{quote(link)}">{escape(Path(link).name)}</a></div>' for link in links)
    command = f"<p><code>{escape(str(pairs['command']))}</code></p>" if "command" in pairs else ""
    return f'{command}<div class="facts">{items}</div>'


def _tiles(contents: Iterable[tuple[str, str, str]]) -> str:
    """Scores as (value, score, data set)."""
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
    rows = "\n".join(_row(row, [c for r, c in content.best if r == i]) for i, row in enumerate(content.rows))
    note = f'<p class="note">{escape(content.note)}</p>' if content.note else ""
    title = f"<h2>{escape(content.title)}</h2>"
    own = ' class="own"' if "this run" in content.header else ""
    return f'<div>{title}<div class="wide"><table{own}><tr>{head}</tr>\n{rows}</table></div>{note}</div>'


def _row(cells: Sequence[str], best: Collection[int] = ()) -> str:
    if len(cells) == 1:  # a heading
        return f'<tr class="group"><td colspan="99">{escape(cells[0])}</td></tr>'
    marks = [' class="best"' if column in best else "" for column in range(len(cells))]
    return "<tr>" + "".join(f"<td{mark}>{escape(cell)}</td>" for mark, cell in zip(marks, cells, strict=True)) + "</tr>"


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


def _captions(name: str, samples: Sequence[Mapping[str, Any]], worst: Sequence[Mapping[str, Any]]) -> str:
    what = "answer" if any("question" in sample for sample in samples) else "caption"
    note = f'<p class="note">Bold: the generated {what}, green if it equals a reference. Below it: references.</p>'
    far = f"<h3>furthest from their references</h3>{_cards(worst)}" if worst else ""
    return f"<h2>{escape(data_name(name))}: {what}s</h2>{note}{_cards(samples)}{far}"


def _cards(samples: Sequence[Mapping[str, Any]]) -> str:
    return '<div class="cards">' + "\n".join(_caption_card(sample) for sample in samples) + "</div>"


def _confusion(name: str, samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    rows = "\n".join(
        f"<tr><td>{_image(s['image'])}</td><td>{escape(s['class'])}</td><td>{escape(s['taken_for'])}</td>"
        f"<td>{escape(str(s['images']))} of {escape(str(s['of']))}</td></tr>"
        for s in samples
    )
    head = "<tr><th></th><th>class</th><th>taken for</th><th>images</th></tr>"
    title = f"<h2>{escape(data_name(name))}: confused classes</h2>"
    return f'{title}<div class="wide"><table class="confused">{head}{rows}</table></div>'


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
            f'<figure><img src="{_source(part["map"])}" alt=""><figcaption>{escape(part["word"])}</figcaption></figure>'
            for part in sample["words"]
        )
        + "</div>"
        for sample in samples
    )
    note = '<p class="note">Bright: the patches attended to for the word below, averaged over layers and heads.</p>'
    return f"<h2>{escape(data_name(name))}: attention</h2>{note}{rows}"


def _retrieval(name: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    parts = {
        "text to image": _found_images(samples["text_to_image"]),
        "image to text": _found_texts(samples["image_to_text"]),
        "text to image, the clearest mistakes": _found_images(samples.get("text_to_image_mistakes", [])),
        "image to text, the clearest mistakes": _found_texts(samples.get("image_to_text_mistakes", [])),
    }
    note = '<p class="note">The five best answers, best first; correct ones are green.</p>'
    body = "".join(f"<h3>{title}</h3>{part}" for title, part in parts.items() if part)
    return f"<h2>{escape(data_name(name))}: retrieval</h2>{note}{body}"


def _found_images(queries: Sequence[Mapping[str, Any]]) -> str:
    return "".join(
        f'<p>{escape(query["text"])}</p><div class="answers">'
        + "".join(f'<div class="{_mark(a)}">{_image(a["image"])}</div>' for a in query["answers"])
        + "</div>"
        for query in queries
    )


def _found_texts(queries: Sequence[Mapping[str, Any]]) -> str:
    return "".join(
        f'<div class="query"><div>{_image(query["image"])}</div><ol>'
        + "".join(f'<li class="{_mark(a)}">{escape(a["text"])}</li>' for a in query["answers"])
        + "</ol></div>"
        for query in queries
    )


def _mark(answer: Mapping[str, Any]) -> str:
    return "hit" if answer["hit"] else "miss"


def _image(source: str) -> str:
    pixels = ' class="pixels"' if source.startswith("data:image/png") else ""  # small: not smoothed
    return f'<img src="{_source(source)}"{pixels} alt="">'


def _source(text: str) -> str:
    """Of a picture within the page; a stranger's run folder could name anything else."""
    return escape(text) if text.startswith("data:image/") else ""
