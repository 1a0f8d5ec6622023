"""How the page looks: style, banner, and the table of captions. No font or script comes from another machine."""

from collections.abc import Iterable, Sequence
from html import escape

from coca_lit.demo.answers import Candidate

FONTS = ["system-ui", "sans-serif"]
STYLE = """
.gradio-container { max-width: 1240px !important; margin: auto; }
#banner h1 { font-size: 1.5rem; margin: 0 0 .2rem; }
#banner p { margin: .1rem 0; opacity: .8; }
#banner code { font-size: .9em; }
#banner .note { border-left: 4px solid var(--primary-500); padding: .35rem .8rem; margin-top: .6rem; opacity: 1;
  background: var(--background-fill-secondary); border-radius: 4px; }
.best { font-size: 1.35rem; font-weight: 600; line-height: 1.35; padding: .4rem 0 .9rem; }
.captions { width: 100%; border: 0 !important; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.captions tr { border: 0 !important; }
.captions th, .captions td { border: 0 !important; text-align: right !important; padding: .45rem .7rem !important; }
.captions th { font-size: .85rem; opacity: .75; white-space: nowrap; }
.captions td { border-top: 1px solid var(--border-color-primary) !important; }
.captions th:first-child, .captions td:first-child { text-align: left !important; width: 70%; }
.captions tr.first td { font-weight: 600; background: var(--background-fill-primary); }
.hint { opacity: .7; }
#found .caption-label { font-size: .75rem; padding: 0 .4rem; max-width: 94%; left: 3%; right: auto; bottom: 3%; }
"""
EMPTY = '<div class="hint">Choose a photo, or click on an example.</div>'


def banner(checkpoint: str, builtin: bool, vocabulary: Sequence[str] | None) -> str:
    """Heading of the page: which model this is and, for a closed vocabulary, what it can talk about."""
    notes = []
    if builtin:
        notes.append(
            "This is the <b>built-in demo model</b>: a small CoCa that learned coloured shapes in a row or a column, "
            "and nothing about photos. Show your own model with <code>coca-demo checkpoint=PATH</code>."
        )
    if vocabulary is not None:
        notes.append(f"It knows {len(vocabulary)} words: {escape(' '.join(vocabulary))}.")
    note = f'<div class="note">{"<br>".join(notes)}</div>' if notes else ""
    return f"<h1>Contrastive Captioner</h1><p>Model: <code>{escape(checkpoint)}</code></p>{note}"


def caption_table(candidates: Iterable[Candidate], weight: float, logit_scale: float) -> str:
    """The first caption in large letters, all of them with their scores below, in the given order."""
    candidates = list(candidates)
    rows = [
        f"<td>{escape(c.caption) or '(empty)'}</td><td>{c.log_prob:.3f}</td><td>{c.similarity:.3f}</td>"
        f"<td>{c.score(weight, logit_scale):.3f}</td>"
        for c in candidates
    ]
    names = ("caption", "log-probability", "similarity", "score")
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(f"<tr{' class=first' if i == 0 else ''}>{row}</tr>" for i, row in enumerate(rows))
    best = escape(candidates[0].caption) or "(empty)"
    return f'<div class="best">{best}</div><table class="captions"><tr>{head}</tr>{body}</table>'
