"""The page: a photo on the left, what the model says about it on the right, in tabs."""

import functools
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from coca_lit.demo.answers import (
    Candidate,
    Strategy,
    classify,
    rank,
    read_photo,
    rerank_images,
    why_second,
    write_captions,
)
from coca_lit.errors import DataError
from coca_lit.inference.search import Hit, ImageIndex
from coca_lit.models import CoCa, part_sizes
from coca_lit.models.generation.options import OPTIONS
from coca_lit.tokenizer import WordTokenizer
from coca_lit.weights.hub import released

EDGE = 1024  # pixels of the longer side of an image on the page
EXAMPLES = 8
FOUND = 12  # images that a search shows
RERANKED = 24  # the nearest images, which the decoder re-ranks
SCENE_WORDS = "circle, square, triangle, star, cross, ring"
PHOTO_WORDS = "dog, cat, person, car, landscape"
EMPTY = '<div class="hint">Choose a photo, or click on an example.</div>'
SCORES = (
    "<b>log-probability</b>: what the captioner thinks, the mean over the tokens; 0 would be certain. "
    "<b>similarity</b>: what the image and the text encoder think, the cosine of photo and caption. "
    "<b>score</b>: the mixture of both that the slider sets; it orders the captions."
)

Trigger = Callable[..., Any]  # an event of gradio


def build_page(model: CoCa, checkpoint: str, index: ImageIndex | None, builtin: bool = False) -> gr.Blocks:
    """The page of a model in evaluation mode; `index` is the folder to search, its first images are the examples."""
    vocabulary = model.tokenizer.spec if isinstance(model.tokenizer, WordTokenizer) else None
    with gr.Blocks(title="Contrastive Captioner", analytics_enabled=False) as page:
        gr.HTML(_banner(model, checkpoint, builtin, vocabulary), elem_id="banner")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2):
                photo, changes = _photo(index)
            with gr.Column(scale=3), gr.Tabs():
                with gr.Tab("Captions"):
                    _caption_tab(model, photo, changes)
                with gr.Tab("Classification"):
                    _classification_tab(model, photo, vocabulary is not None)
                with gr.Tab("Search"):
                    _search_tab(model, index, photo)
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

        def on_select(event: gr.SelectData) -> Image.Image:
            try:
                return _thumbnail(paths[event.index])
            except DataError as error:  # the file has gone; no caption follows
                raise gr.Error(str(error), duration=None, print_exception=False) from error

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

    def on_write(path: str | None, strategy: Strategy, count: int, weight: float, draw: int) -> tuple[Any, ...]:
        if path is None:  # none yet, or the upload was refused
            return [], draw, EMPTY
        found = write_captions(model, read_photo(path), strategy, int(count), seed=draw)
        return found, draw + 1, show(found, weight)

    inputs, outputs = [photo, strategy, count, weight, draws], [candidates, draws, answer]
    for event in (write.click, *changes):
        _busy(event, write, "Writing …", on_write, inputs, outputs, concurrency_id="model", api_name="caption")
    photo.clear(lambda: ([], EMPTY), outputs=[candidates, answer], api_visibility="private")
    weight.change(show, [candidates, weight], answer, show_progress="hidden", api_visibility="private")


def _classification_tab(model: CoCa, photo: gr.Image, scenes: bool) -> None:
    words, prompt = (SCENE_WORDS, "a {}") if scenes else (PHOTO_WORDS, "a photo of a {}")
    labels = gr.Textbox(words, label="labels", info="separated by commas", elem_id="labels")
    template = gr.Textbox(prompt, label="template", info="{} is replaced by the label", elem_id="template")
    button = gr.Button("Classify", variant="primary")
    answer = gr.Label(label="probability", num_top_classes=10, elem_id="classes")

    def on_classify(path: str | None, labels: str, template: str) -> dict[str, float]:
        return classify(model, read_photo(_require_photo(path)), labels.replace("\n", ",").split(","), template)

    gr.HTML("Probabilities among these labels alone, at the model's own temperature.", elem_classes="hint")
    inputs = [photo, labels, template]
    for event in (button.click, labels.submit, template.submit):
        _busy(event, button, "Comparing …", on_classify, inputs, answer, concurrency_id="model", api_name="classify")


def _search_tab(model: CoCa, index: ImageIndex | None, photo: gr.Image) -> None:
    if index is None:
        gr.Markdown("Start the page with a folder to search it: `coca-demo images=FOLDER`")
        return
    label = f"search the {len(index):,} images of {index.folder}"
    query = gr.Textbox(label=label, placeholder="describe a picture", elem_id="query")
    decoder = gr.Checkbox(
        label="re-rank by the decoder",
        info=f"the captioner reads the description beside each of the {RERANKED} most similar images; slower",
        visible=model.decoder is not None,
        elem_id="rerank",
    )
    with gr.Row():
        by_text = gr.Button("Search", variant="primary")
        by_photo = gr.Button("Images like the photo")
    gr.HTML("Best first, with the cosine similarity. Click on an image to enlarge it.", elem_classes="hint")
    found = _gallery("found", height=520)

    def show(hits: list[Hit]) -> list[tuple[Any, str]]:
        return [(_thumbnail(hit.path), f"{hit.score:.3f} · {hit.path.name}") for hit in hits]

    def on_text(text: str, by_decoder: bool) -> list[tuple[Any, str]]:
        hits = index.query(text, RERANKED if by_decoder else FOUND)
        return show((rerank_images(model, hits, text) if by_decoder else hits)[:FOUND])

    def on_photo(path: str | None) -> list[tuple[Any, str]]:
        return show(index.query(read_photo(_require_photo(path)), FOUND))

    options: dict[str, Any] = {"outputs": found, "concurrency_id": "model"}
    for event in (by_text.click, query.submit):
        _busy(event, by_text, "Searching …", on_text, inputs=[query, decoder], api_name="search", **options)
    _busy(by_photo.click, by_photo, "Searching …", on_photo, inputs=photo, api_name="search_by_photo", **options)


# Parts


def _busy(
    event: Trigger, button: gr.Button, says: str, function: Callable[..., Any], *args: Any, **options: Any
) -> None:
    """Calls the function on the event; meanwhile the button says what is going on and cannot be pressed. Mistakes of
    the user are shown on the page, which keeps what it has.
    """

    @functools.wraps(function)
    def careful(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (DataError, ValueError) as error:
            gr.Warning(str(error), duration=None)
            return gr.skip()

    label, quiet = button.value, {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    began = event(lambda: gr.Button(says, interactive=False), outputs=button, **quiet)
    ended = began.then(careful, *args, **options)
    ended.then(lambda: gr.Button(label, interactive=True), outputs=button, **quiet)


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


def _banner(model: CoCa, checkpoint: str, builtin: bool, vocabulary: Sequence[str] | None) -> str:
    """Heading of the page: the model, its size and where it comes from; its words if its vocabulary is closed."""
    size = f"{sum(part_sizes(model).values()) / 1e6:,.1f} M parameters, images of {model.image_size} pixels"
    notes = []
    if (known := released(checkpoint)) is not None:
        size += f", OpenCLIP's weights, downloaded once from {known.repo}"
        notes += [escape(known.note)] if known.note else []
    if builtin:
        notes.append(
            "This is the <b>built-in demo model</b>: a small CoCa that learned coloured shapes in a row or a column, "
            "and nothing about photos. <code>coca-demo</code> alone shows a model of photos."
        )
    if vocabulary is not None:
        notes.append(f"It knows {len(vocabulary)} words: {escape(' '.join(vocabulary))}.")
    note = f'<div class="note">{"<br>".join(notes)}</div>' if notes else ""
    origin = f"<p>Model: <code>{escape(checkpoint)}</code>, {escape(size)}</p>"
    return f"<h1>Contrastive Captioner</h1>{origin}{note}"


def _caption_table(candidates: Iterable[Candidate], weight: float, logit_scale: float) -> str:
    """The first caption in large letters, with a picture per word of where the decoder looked; below, all captions with
    their scores, in the given order, what tells the second from the first, and what the scores mean.
    """
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
    looked = "".join(
        f'<figure><img src="{picture}" alt=""><figcaption>{escape(word)}</figcaption></figure>'
        for word, picture in candidates[0].words
    )
    hint = "Bright: where the decoder looked for each word, a hint and no proof."
    maps = f'<div class="maps">{looked}</div><div class="hint">{hint}</div>' if looked else ""
    why = f"<p>Why not the second: it is {escape(reason)}.</p>" if (reason := why_second(candidates)) else ""
    return (
        f'<div class="best">{best}</div>{maps}<div class="scroll"><table class="captions"><tr>{head}</tr>{body}</table>'
        f'</div>{why}<div class="hint">{SCORES}</div>'
    )
