"""The page: a photo on the left, what the model says about it on the right, in tabs."""

import functools
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from coca_lit.demo.answers import Candidate, Strategy, classify, rank, read_photo, write_captions
from coca_lit.errors import DataError
from coca_lit.inference.search import Hit, ImageIndex
from coca_lit.models import CoCa
from coca_lit.models.generation.options import OPTIONS
from coca_lit.tokenizer import WordTokenizer

EDGE = 1024  # pixels of the longer side of an image on the page
EXAMPLES = 8
FOUND = 12  # images that a search shows
SCENE_WORDS = "circle, square, triangle, star, cross, ring"
PHOTO_WORDS = "dog, cat, person, car, landscape"
EMPTY = '<div class="hint">Choose a photo, or click on an example.</div>'

Trigger = Callable[..., Any]  # an event of gradio


def build_page(model: CoCa, checkpoint: str, index: ImageIndex | None, builtin: bool = False) -> gr.Blocks:
    """The page of a model in evaluation mode; `index` is the folder to search, its first images are the examples."""
    vocabulary = model.tokenizer.spec if isinstance(model.tokenizer, WordTokenizer) else None
    with gr.Blocks(title="Contrastive Captioner", analytics_enabled=False) as page:
        gr.HTML(_banner(checkpoint, builtin, vocabulary), elem_id="banner")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2):
                photo, changes = _photo(index)
            with gr.Column(scale=3), gr.Tabs():
                with gr.Tab("Captions"):
                    _caption_tab(model, photo, changes)
                with gr.Tab("Classification"):
                    _classification_tab(model, photo, vocabulary is not None)
                with gr.Tab("Search"):
                    _search_tab(index, photo)
    return page


def _photo(index: ImageIndex | None) -> tuple[gr.Image, list[Trigger]]:
    """The photo, and the events that bring a new, readable one."""
    photo = gr.Image(
        label="photo",
        sources=["upload", "clipboard"],
        type="filepath",
        image_mode=None,  # the file unchanged
        format="png",
        height=360,
        elem_id="photo",
    )

    def on_upload(file: dict[str, Any]) -> str | None:
        try:
            read_photo(file["path"])
        except DataError as error:
            gr.Warning(str(error), duration=None)
            return None
        return file["path"]

    # Without gradio's preprocessing our own checks come before any decoder.
    upload = photo.upload(on_upload, photo, photo, preprocess=False, show_progress="hidden", api_visibility="private")
    changes: list[Trigger] = [upload.success]
    if index is not None:
        paths = index.paths[:: max(len(index) // EXAMPLES, 1)][:EXAMPLES]
        gr.HTML("Examples", elem_classes="hint")
        pictures = [_thumbnail(path) for path in paths]
        examples = _gallery("examples", height=250, value=pictures, allow_preview=False)

        @_shows_errors
        def on_select(event: gr.SelectData) -> Image.Image:
            return _thumbnail(paths[event.index])

        example = examples.select(on_select, outputs=photo, show_progress="hidden", api_visibility="private")
        changes.append(example.success)
    return photo, changes


# Tabs


def _caption_tab(model: CoCa, photo: gr.Image, changes: list[Trigger]) -> None:
    if model.decoder is None:
        gr.Markdown("This model has no decoder, so it cannot write captions. It can classify and search.")
        return
    scale = float(model.logit_scale.detach().exp())
    with gr.Row():
        strategy = gr.Radio(
            ["beam", "sample", "greedy"], value="beam", label="strategy", info="how captions are written"
        )
        count = gr.Slider(1, 10, value=5, step=1, label="candidates", info="greedy writes a single one")
    weight = gr.Slider(
        0,
        1,
        value=OPTIONS["rerank_weight"].default,
        step=0.05,
        label="order by",
        info="0: the captioner's log-probability, 1: the image-text similarity; between: a mixture of both",
        elem_id="weight",
    )
    write = gr.Button("Write captions", variant="primary")
    answer = gr.HTML(EMPTY, elem_id="captions")
    candidates, draws = gr.State([]), gr.State(0)

    def show(found: list[Candidate], weight: float) -> str:
        return _caption_table(rank(found, weight, scale), weight, scale) if found else EMPTY

    @_shows_errors
    def on_write(path: str | None, strategy: Strategy, count: int, weight: float, draw: int) -> tuple[Any, ...]:
        if path is None:  # none yet, or the upload was refused
            return [], draw, EMPTY
        found = write_captions(model, read_photo(path), strategy, int(count), seed=draw)
        return found, draw + 1, show(found, weight)

    inputs, outputs = [photo, strategy, count, weight, draws], [candidates, draws, answer]
    for event in (write.click, *changes):
        event(on_write, inputs, outputs, concurrency_id="model", api_name="caption")
    photo.clear(lambda: ([], EMPTY), outputs=[candidates, answer], api_visibility="private")
    weight.change(show, [candidates, weight], answer, show_progress="hidden", api_visibility="private")


def _classification_tab(model: CoCa, photo: gr.Image, scenes: bool) -> None:
    words, prompt = (SCENE_WORDS, "a {}") if scenes else (PHOTO_WORDS, "a photo of a {}")
    labels = gr.Textbox(words, label="labels", info="separated by commas", elem_id="labels")
    template = gr.Textbox(prompt, label="template", info="{} is replaced by the label", elem_id="template")
    button = gr.Button("Classify", variant="primary")
    answer = gr.Label(label="probability", num_top_classes=10, elem_id="classes")

    @_shows_errors
    def on_classify(path: str | None, labels: str, template: str) -> dict[str, float]:
        return classify(model, read_photo(_require_photo(path)), labels.replace("\n", ",").split(","), template)

    events, inputs = [button.click, labels.submit, template.submit], [photo, labels, template]
    gr.on(events, on_classify, inputs, answer, concurrency_id="model", api_name="classify")


def _search_tab(index: ImageIndex | None, photo: gr.Image) -> None:
    if index is None:
        gr.Markdown("Start the page with a folder to search it: `coca-demo images=FOLDER`")
        return
    label = f"search the {len(index):,} images of {index.folder}"
    query = gr.Textbox(label=label, placeholder="describe a picture", elem_id="query")
    with gr.Row():
        by_text = gr.Button("Search", variant="primary")
        by_photo = gr.Button("Images like the photo")
    gr.HTML("Best first, with the cosine similarity. Click on an image to enlarge it.", elem_classes="hint")
    found = _gallery("found", height=520)

    def show(hits: list[Hit]) -> list[tuple[Any, str]]:
        return [(_thumbnail(hit.path), f"{hit.score:.3f} · {hit.path.name}") for hit in hits]

    @_shows_errors
    def on_text(text: str) -> list[tuple[Any, str]]:
        return show(index.query(text, FOUND))

    @_shows_errors
    def on_photo(path: str | None) -> list[tuple[Any, str]]:
        return show(index.query(read_photo(_require_photo(path)), FOUND))

    gr.on([by_text.click, query.submit], on_text, query, found, concurrency_id="model", api_name="search")
    by_photo.click(on_photo, photo, found, concurrency_id="model", api_name="search_by_photo")


# Parts


def _shows_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Shows mistakes of the user on the page, which keeps working."""

    @functools.wraps(function)
    def wrapped(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (DataError, ValueError) as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    return wrapped


def _gallery(name: str, height: int, value: list[Any] | None = None, allow_preview: bool = True) -> gr.Gallery:
    return gr.Gallery(
        value,
        elem_id=name,
        show_label=False,
        buttons=[],
        columns=4,
        height=height,
        object_fit="contain",
        interactive=False,
        allow_preview=allow_preview,
    )


def _require_photo(path: str | None) -> str:
    if path is None:
        raise ValueError("choose a photo first, or click on an example")
    return path


def _thumbnail(path: Path) -> Image.Image:
    image = read_photo(path)
    image.thumbnail((EDGE, EDGE))
    return image


def _banner(checkpoint: str, builtin: bool, vocabulary: Sequence[str] | None) -> str:
    """Heading of the page: the model and, if its vocabulary is closed, its words."""
    notes = []
    if builtin:
        notes.append(
            "This is the <b>built-in demo model</b>: a small CoCa that learned coloured shapes in a row or a column, "
            "and nothing about photos. <code>coca-demo</code> alone shows a model of photos."
        )
    if vocabulary is not None:
        notes.append(f"It knows {len(vocabulary)} words: {escape(' '.join(vocabulary))}.")
    note = f'<div class="note">{"<br>".join(notes)}</div>' if notes else ""
    return f"<h1>Contrastive Captioner</h1><p>Model: <code>{escape(checkpoint)}</code></p>{note}"


def _caption_table(candidates: Iterable[Candidate], weight: float, logit_scale: float) -> str:
    """The first caption in large letters; below, all of them with their scores, in the given order."""
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
