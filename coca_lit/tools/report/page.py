"""The report as `report.html`, one page that opens from disk without scripts or other files, and as `report.md`."""

import base64
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

from coca_lit.files import atomic_write
from coca_lit.runs.scores import cell, data_name, headline, score_name
from coca_lit.tools.report.figures import comparison_figure, curves_figures, curves_of_runs, gap_figure, side_by_side
from coca_lit.tools.report.runs import Run, obstacles, read_run
from coca_lit.tools.report.tables import (
    APART,
    PUBLISHED_SCORES,
    THIS_RUN,
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
    "seconds": "time since its last start",
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
HIT = {True: "hit", False: "miss"}  # classes of answers
MARKS_NOTE = "✓: it equals a reference. Underlined: words that no reference has, or none has there."
MANY = 5  # runs, whose captions are too many for a card
STYLE = Path(__file__).parents[2] / "assets" / "report.css"


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
        _tiles(headline_cells(run)),
        *(_captions(name, samples, worst.get(name, [])) for name, samples in captions.items()),
        _tables(tables),
        _reasons("not run", run.not_run),
        _curves(curves, CURVES_NOTE if curves.keys() - {"losses"} else ""),
        *(_figure(name, sheet) for name, sheet in run.sheets.items() if name not in shown),
        *(_retrieval(name, samples) for name, samples in retrieval.items()),
        *(_attention(name, samples) for name, samples in run.samples["attention"].items()),
        *(_confusion(name, samples) for name, samples in run.samples["confusion"].items()),
        _facts_html(facts, links),
    ]
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
        _facts_html(facts, heading=""),
        _tables(overview),
        _reasons("failed", failed),
        _tables(scores),
        _reasons(APART, apart),
        *(_figure(title, figure) for title, figure in figures.items()),
        _curves(curves_of_runs(runs), "Scores during training are of the first few images."),
        _side_by_side(runs),
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
    sections: Iterable[str],
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
    body = "\n".join([f"<h1>{_text(title)}</h1>", *filter(None, sections)])
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_text(title)}</title>'
    head = f"<head>{head}<style>\n{STYLE.read_text(encoding='utf-8')}</style></head>"
    page = f'<!doctype html>\n<html lang="en">{head}\n<body>\n{body}\n</body></html>\n'
    atomic_write(folder / "report.md", ("\n".join(lines) + "\n").encode())
    atomic_write(folder / "report.html", page.encode())
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


def _text(text: str) -> str:
    """Text from anywhere within a page."""
    return escape(one_line(text))


def _facts_html(pairs: Mapping[str, str], links: Sequence[str] = (), heading: str = "about this run") -> str:
    """Facts about the run, below its command, with links to files beside the page."""
    rest = {key: value for key, value in pairs.items() if key != "command"}
    items = "".join(f"<div><span>{_text(key)}</span> {_text(value)}</div>" for key, value in rest.items())
    items += "".join(f'<div><a href="{quote(link)}">{Path(link).name}</a></div>' for link in links)
    command = f"<p><code>{_text(pairs['command'])}</code></p>" if "command" in pairs else ""
    title = f"<h2>{heading}</h2>" if heading and (items or command) else ""
    return f'{title}{command}<div class="facts">{items}</div>' if items or command else ""


def _tiles(contents: Iterable[tuple[str, str, str, str]]) -> str:
    """Scores as (value, interval, score, data set)."""
    items = "".join(
        f'<div class="tile"><b>{_text(value)}</b>'
        + (f'<span class="interval">{_text(interval)}</span>' if interval else "")
        + f"<span>{_text(score)}</span><span>{_text(data)}</span></div>"
        for value, interval, score, data in contents
    )
    note = '<p class="note">In brackets: 95 % intervals.</p>' if "interval" in items else ""
    return f'<div class="tiles">{items}</div>{note}' if items else ""


def _tables(contents: Iterable[Table]) -> str:
    """Tables side by side, as many as fit."""
    tables = []
    for content in contents:
        if not content.rows:
            continue
        head = "".join(f"<th>{_text(text)}</th>" for text in content.header)
        rows = ""
        for i, row in enumerate(content.rows):
            marks = [' class="best"' if (i, column) in content.best else "" for column in range(len(row))]
            cells = "".join(f"<td{mark}>{_text(cell)}</td>" for mark, cell in zip(marks, row, strict=True))
            heading = f'<tr class="group"><td colspan="99">{_text(row[0])}</td></tr>'
            rows += "\n" + (heading if len(row) == 1 else f"<tr>{cells}</tr>")
        note = f'<p class="note">{_text(content.note)}</p>' if content.note else ""
        own = ' class="own"' if THIS_RUN in content.header else ""
        table = f'<div class="wide" tabindex="0"><table{own}><tr>{head}</tr>{rows}</table></div>'
        tables.append(f"<div><h2>{_text(content.title)}</h2>{table}{note}</div>")
    return f'<div class="tables">{"".join(tables)}</div>'


def _figure(title: str, png: bytes) -> str:
    return f'<h2>{_text(title)}</h2><figure class="plot"><img src="{_png(png)}" alt="{_text(title)}"></figure>'


def _curves(panels: Mapping[str, bytes], note: str) -> str:
    """Figures side by side where they fit, below each other on a phone."""
    if not panels:
        return ""
    images = "".join(f'<img src="{_png(png)}" alt="{_text(name)}">' for name, png in panels.items())
    return f'<h2>curves</h2><figure class="panels">{images}</figure>' + (
        f'<p class="note">{_text(note)}</p>' if note else ""
    )


def _png(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _reasons(title: str, reasons: Mapping[str, str]) -> str:
    """A list of names with the reasons why they are missing."""
    if not reasons:
        return ""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)  # the same reason often applies to several
    items = "".join(f"<li><b>{_text(', '.join(group))}</b>: {_text(reason)}</li>" for reason, group in names.items())
    return f'<h2>{_text(title)}</h2><ul class="note">{items}</ul>'


def _captions(name: str, samples: Sequence[Mapping[str, Any]], worst: Sequence[Mapping[str, Any]]) -> str:
    what = "answer" if any("question" in sample for sample in samples) else "caption"
    note = f'<p class="note">Bold: the generated {what}. {MARKS_NOTE} Below it: references.</p>'
    shown = {json.dumps(sample, sort_keys=True) for sample in samples}
    if all(json.dumps(sample, sort_keys=True) in shown for sample in worst):  # of few photos, all are shown above
        worst = []
    far = f"<h3>furthest from their references</h3>{_cards(worst)}" if worst else ""
    return f"<h2>{_text(data_name(name))}: {what}s</h2>{note}{_cards(samples)}{far}"


def _cards(samples: Sequence[Mapping[str, Any]]) -> str:
    cards = []
    for sample in samples:
        question = f"{_text(sample['question'].rstrip('?'))}? " if "question" in sample else ""
        cards.append(_card(sample, f"<p>{question}{_caption(sample)}</p>"))
    return '<div class="cards">' + "\n".join(cards) + "</div>"


def _card(sample: Mapping[str, Any], paragraphs: str) -> str:
    references = "".join(f"<li>{_text(text)}</li>" for text in sample["references"][:3])
    return f'<div class="card">{_image(sample["image"])}{paragraphs}<ul class="note">{references}</ul></div>'


def _caption(sample: Mapping[str, Any]) -> str:
    """A generated text, with a tick if it equals a reference, else with marks at what differs from all of them."""
    if sample["exact"]:
        return f'<b class="hit">{_text(sample["caption"])} ✓</b>'
    parts = unlike(sample["caption"], sample["references"]) or [("(empty)", True)]
    return "<b>" + " ".join(f"<u>{_text(word)}</u>" if odd else _text(word) for word, odd in parts) + "</b>"


def _side_by_side(runs: Sequence[Run]) -> str:
    """What the runs write about the same images; nothing for runs of other images."""
    parts = []
    first, *others = runs
    for name, samples in first.samples["captions"].items():
        found = [{(s["image"], *s["references"]): s for s in run.samples["captions"].get(name, [])} for run in others]
        cards = []
        for sample in samples if 0 < len(others) < MANY else []:
            same = [own.get((sample["image"], *sample["references"])) for own in found]
            if all(same):
                texts = zip(run_names(runs), [sample, *filter(None, same)], strict=True)
                lines = "".join(f'<p><span class="note">{_text(run)}:</span> {_caption(s)}</p>' for run, s in texts)
                cards.append(_card(sample, lines))
        if cards:
            note = f'<p class="note">{MARKS_NOTE} Below: references.</p>'
            parts.append(f'<h2>{_text(data_name(name))}: captions</h2>{note}<div class="cards">{"".join(cards)}</div>')
    return "".join(parts)


def _confusion(name: str, samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    rows = "\n".join(
        f"<tr><td>{_image(s['image'])}</td><td>{_text(s['class'])}</td><td>{_text(s['taken_for'])}</td>"
        f"<td>{s['images']} of {s['of']}</td></tr>"
        for s in samples
    )
    head = "<tr><th></th><th>class</th><th>taken for</th><th>images</th></tr>"
    title = f"<h2>{_text(data_name(name))}: confused classes</h2>"
    return f'{title}<div class="wide"><table class="confused">{head}{rows}</table></div>'


def _attention(name: str, samples: Sequence[Mapping[str, Any]]) -> str:
    rows = "\n".join(
        f'<div class="words"><figure>{_image(sample["image"])}<figcaption>input</figcaption></figure>'
        + "".join(
            f'<figure><img src="{_source(part["map"])}" alt=""><figcaption>{_text(part["word"])}</figcaption></figure>'
            for part in sample["words"]
        )
        + "</div>"
        for sample in samples
    )
    note = '<p class="note">Bright: the patches attended to for the word below, averaged over layers and heads.</p>'
    return f"<h2>{_text(data_name(name))}: attention</h2>{note}{rows}"


def _retrieval(name: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    parts = {
        "text to image": _found_images(samples["text_to_image"]),
        "image to text": _found_texts(samples["image_to_text"]),
        "text to image, the clearest mistakes": _found_images(samples.get("text_to_image_mistakes", [])),
        "image to text, the clearest mistakes": _found_texts(samples.get("image_to_text_mistakes", [])),
    }
    note = '<p class="note">The five best answers, best first; ✓: right.</p>'
    body = "".join(f"<h3>{title}</h3>{part}" for title, part in parts.items() if part)
    return f"<h2>{_text(data_name(name))}: retrieval</h2>{note}{body}"


def _found_images(queries: Sequence[Mapping[str, Any]]) -> str:
    return "".join(
        f'<p>{_text(query["text"])}</p><div class="answers">'
        + "".join(f'<div class="{HIT[a["hit"]]}">{_image(a["image"])}</div>' for a in query["answers"])
        + "</div>"
        for query in queries
    )


def _found_texts(queries: Sequence[Mapping[str, Any]]) -> str:
    return "".join(
        f'<div class="query"><div>{_image(query["image"])}</div><ol>'
        + "".join(f'<li class="{HIT[a["hit"]]}">{_text(a["text"])}</li>' for a in query["answers"])
        + "</ol></div>"
        for query in queries
    )


def _image(source: str) -> str:
    pixels = ' class="pixels"' if source.startswith("data:image/png") else ""  # small: not smoothed
    return f'<img src="{_source(source)}"{pixels} alt="">'


def _source(text: str) -> str:
    """Of a picture within the page; a stranger's run folder could name anything else."""
    return escape(text) if text.startswith("data:image/") else ""


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
