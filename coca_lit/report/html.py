"""The report as one HTML page that opens from disk: no script, no outside file."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from coca_lit.report.tables import Table

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #2a9d5c; --bad: #8886; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin-bottom: .4rem; } .note { opacity: .7; font-size: .88rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem; } .tables h2 { border: 0; }
td:nth-child(2) { background: var(--soft); } figure { margin: 1rem 0; } figure img { max-width: 100%; background:
white; } .cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 1rem; } .card {
border: 1px solid var(--line); border-radius: 6px; padding: .6rem; } .card img, .query img, .answers img { width:
100%; display: block; border-radius: 4px; }
img.pixels { image-rendering: pixelated; } .card p { margin: .5rem 0 0; } .card ul { margin: .3rem 0 0; padding-left:
1.1rem; } .hit { color: var(--good); font-weight: 600; } li.miss { opacity: .75; } .answers { display: grid; grid-
template-columns: repeat(5, 1fr); gap: .6rem; margin-bottom: 1.4rem; max-width: 800px; } .answers div { border: 4px
solid var(--bad); border-radius: 8px; } .answers div.hit { border-color: var(--good); } .query { display: grid; grid-
template-columns: 140px 1fr; gap: 1rem; margin-bottom: 1.2rem; align-items: start; }
"""


def page(title: str, sections: Iterable[str]) -> str:
    body = "\n".join([f"<h1>{escape(title)}</h1>", *(section for section in sections if section)])
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def facts(pairs: Mapping[str, Any]) -> str:
    return "<p>" + "<br>".join(f"{escape(key)}: <b>{escape(str(value))}</b>" for key, value in pairs.items()) + "</p>"


def tables(contents: Iterable[Table]) -> str:
    """Tables side by side, as many as fit."""
    return '<div class="tables">' + "".join(_table(content) for content in contents if content.rows) + "</div>"


def _table(content: Table) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in content.header)
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in content.rows)
    note = f'<p class="note">{escape(content.note)}</p>' if content.note else ""
    title = f"<h2>{escape(content.title)}</h2>"
    return f'<div>{title}<div class="wide"><table><tr>{head}</tr>\n{rows}</table></div>{note}</div>'


def figure(title: str, png: bytes | None) -> str:
    if png is None:
        return ""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<h2>{escape(title)}</h2><figure><img src="{source}" alt="{escape(title)}"></figure>'


def not_run(reasons: Mapping[str, str]) -> str:
    if not reasons:
        return ""
    items = "".join(f"<li><b>{escape(name)}</b>: {escape(reason)}</li>" for name, reason in reasons.items())
    return f'<h2>not run</h2><ul class="note">{items}</ul>'


def captions(name: str, samples: Sequence[Mapping[str, Any]]) -> str:
    cards = "\n".join(_caption_card(sample) for sample in samples)
    note = '<p class="note">Bold: the generated caption, green if it equals a reference. Below: references.</p>'
    return f'<h2>{escape(name)}: captions</h2>{note}<div class="cards">{cards}</div>'


def _caption_card(sample: Mapping[str, Any]) -> str:
    references = "".join(f"<li>{escape(text)}</li>" for text in sample["references"][:3])
    style = ' class="hit"' if sample["exact"] else ""
    caption = escape(sample["caption"] or "(empty)")
    card = f'{_image(sample["image"])}<p><b{style}>{caption}</b></p><ul class="note">{references}</ul>'
    return f'<div class="card">{card}</div>'


def retrieval(name: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
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
    note = '<p class="note">The five best answers, best first; green: right.</p>'
    title = f"<h2>{escape(name)}: retrieval</h2>{note}"
    return f"{title}<h3>text to image</h3>{to_images}<h3>image to text</h3>{to_texts}"


def _mark(answer: Mapping[str, Any]) -> str:
    return "hit" if answer["hit"] else "miss"


def _image(source: str) -> str:
    pixels = ' class="pixels"' if source.startswith("data:image/png") else ""  # small images, enlarged as they are
    return f'<img src="{source}"{pixels} alt="">'
