"""The page: a photo on the left, what the model says about it on the right, in tabs.

It is served to this machine only, with its style. Neither gradio nor the browser contacts another machine, and no page
of another name that resolves to this machine reads it.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response

from coca_lit.errors import ConfigError, DataError
from coca_lit.models import CoCa, part_sizes
from coca_lit.models.generation.options import OPTIONS
from coca_lit.tokenizer import WordTokenizer
from coca_lit.tools.checkpoint import knows_only_scenes
from coca_lit.tools.demo.answers import (
    Candidate,
    Strategy,
    classify,
    rank,
    read_photo,
    rerank_images,
    shares,
    why_second,
    write_captions,
)
from coca_lit.tools.search.index import Hit, ImageIndex, cut_note
from coca_lit.weights.hub import released

EDGE = 1024  # pixels of the longer side of an image on the page
EXAMPLES = 8
FOUND = 12  # images that a search shows
CANDIDATES = 8  # captions of which the best is chosen: as many as in experiments/contrastive_reranking
RERANKED = 24  # the nearest images: the decoder re-ranks them, or they replace those that have gone
SCENE_WORDS = "circle, square, triangle, star, cross, ring"
PHOTO_WORDS = "man, woman, child, dog, cat, car, landscape"
EMPTY = '<div class="ask">Choose a photo, or click on an example.</div>'
GONE = "the images that were found have gone since the page was started: start it again"
SAME = 0.999  # cosine of two copies of a photo
STRATEGIES = [("best of several", "beam"), ("varied", "sample"), ("a single one, fast", "greedy")]
SURE = ((0.75, "sure"), (0.5, "fairly sure"), (0.25, "unsure"), (0.0, "guessing"))  # from which share on
SCORES = (
    "<b>Sure of its words</b>: the probability that the captioner gives each of them, in the mean. "
    "<b>Fits the photo</b>: how the image and the text encoder share 100 % among these captions. "
    "<b>Best</b>: the same by both, in the mixture that the slider sets; the captions are in this order."
)
HOST = "127.0.0.1"
MAX_UPLOAD = "30mb"
# The browser refuses requests of any library to another machine.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
FONTS = ["system-ui", "sans-serif"]
STYLE = Path(__file__).parents[2] / "assets" / "demo.css"
LOOK: dict[str, Any] = {  # arguments of `gr.Blocks.launch`, wherever the page is
    "ssr_mode": False,
    "max_file_size": MAX_UPLOAD,
    "footer_links": [],
    "theme": gr.themes.Soft(primary_hue="indigo", font=FONTS, font_mono=["ui-monospace", "monospace"]),
    "css": STYLE.read_text(encoding="utf-8"),
}

Trigger = Callable[..., Any]  # an event of gradio


def build_page(model: CoCa, checkpoint: str, index: ImageIndex | None, builtin: bool = False) -> gr.Blocks:
    """The page of a model in evaluation mode; `index` is the folder to search, its first images are the examples."""
    vocabulary = list(model.tokenizer.spec) if isinstance(model.tokenizer, WordTokenizer) else None
    with gr.Blocks(title="Contrastive Captioner", analytics_enabled=False) as page:
        gr.HTML(_banner(model, checkpoint, builtin, vocabulary), elem_id="banner")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2):
                photo, changes = _photo(index)
            with gr.Column(scale=3), gr.Tabs():
                with gr.Tab("Captions"):
                    _caption_tab(model, photo, changes)
                with gr.Tab("Classification"):
                    _classification_tab(model, photo, vocabulary)
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
            gr.Warning(_as_text(error), duration=None)
            return None
        return file["path"]

    # Without gradio's preprocessing our own checks come before any decoder.
    upload = photo.upload(on_upload, photo, photo, preprocess=False, show_progress="hidden", api_visibility="private")
    changes: list[Trigger] = [upload.success]
    if index is not None:
        paths = index.paths[:: max(len(index) // EXAMPLES, 1)][:EXAMPLES]
        gr.HTML("Examples", elem_classes="hint")
        pictures = [_thumbnail(path) for path in paths]
        examples = _gallery("examples", value=pictures, allow_preview=False)

        def on_select(event: gr.SelectData) -> Image.Image:
            try:
                return _thumbnail(paths[event.index])
            except DataError as error:  # the file has gone; no caption follows
                raise gr.Error(_as_text(error), duration=None, print_exception=False) from error

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
        strategy = gr.Radio(STRATEGIES, value="beam", label="how captions are written")
        count = gr.Slider(1, 10, value=CANDIDATES, step=1, label="captions")
    weight = gr.Slider(
        0,
        1,
        value=OPTIONS["rerank_weight"].default,
        step=0.05,
        label="which one is best",
        info="0: the one whose words are surest; 1: the one that fits the photo most; between: a mixture",
        elem_id="weight",
    )
    write = gr.Button("Write captions", variant="primary")
    answer = gr.HTML(EMPTY, elem_id="captions")
    candidates = gr.State([])
    draws = gr.State(0)

    def show(found: list[Candidate], weight: float) -> str:
        return _caption_table(rank(found, weight, scale), weight, scale) if found else EMPTY

    def on_write(path: str | None, strategy: Strategy, count: int, weight: float, draw: int) -> tuple[Any, ...]:
        path = _require_photo(path)
        found = write_captions(model, read_photo(path), strategy, int(count), seed=draw)
        return found, draw + 1, show(found, weight)

    inputs = [photo, strategy, count, weight, draws]
    outputs = [candidates, draws, answer]
    empty: tuple[Any, ...] = ([], 0, EMPTY)

    def on_change(path: str | None, *given: Any) -> tuple[Any, ...]:
        return empty if path is None else on_write(path, *given)  # None: the upload was refused, which has been said

    for event, function in ((write.click, on_write), *((change, on_change) for change in changes)):
        _busy(event, write, "Writing …", function, empty, inputs, outputs, concurrency_id="model", api_name="caption")
    photo.clear(lambda: ([], EMPTY), outputs=[candidates, answer], api_visibility="private")
    weight.change(show, [candidates, weight], answer, show_progress="hidden", api_visibility="private")


def _classification_tab(model: CoCa, photo: gr.Image, vocabulary: Sequence[str] | None) -> None:
    words = PHOTO_WORDS
    prompt = "a photo of a {}"
    if vocabulary is not None:  # closed: the words that it has
        known = SCENE_WORDS if knows_only_scenes(model) else PHOTO_WORDS
        words = ", ".join(word for word in known.split(", ") if word in vocabulary)
        prompt = "a {}"
    labels = gr.Textbox(words, label="labels", info="separated by commas", elem_id="labels")
    template = gr.Textbox(prompt, label="template", info="{} is replaced by the label", elem_id="template")
    button = gr.Button("Classify", variant="primary")
    answer = gr.Label(label="the photo shows", num_top_classes=10, elem_id="classes")

    def on_classify(path: str | None, labels: str, template: str) -> dict[str, float]:
        return classify(model, read_photo(_require_photo(path)), labels.replace("\n", ",").split(","), template)

    gr.HTML("The labels share 100 % with “none of these”, which stands for any other text.", elem_classes="hint")
    inputs = [photo, labels, template]
    given = {"concurrency_id": "model", "api_name": "classify"}
    for event in (button.click, labels.submit, template.submit):
        _busy(event, button, "Comparing …", on_classify, None, inputs, answer, **given)
    photo.clear(lambda: None, outputs=answer, api_visibility="private")


def _search_tab(model: CoCa, index: ImageIndex | None, photo: gr.Image) -> None:
    if index is None:
        gr.Markdown("Start the page with a folder to search it: `coca-demo images=FOLDER`")
        return
    label = f"search the {len(index):,} images of {index.folder.absolute().name}"
    query = gr.Textbox(label=label, placeholder="describe a picture", elem_id="query")
    decoder = gr.Checkbox(
        label="re-rank by the decoder",
        info=f"slower: the captioner reads the description beside each of the {RERANKED} most similar images",
        visible=model.decoder is not None,
        elem_id="rerank",
    )
    with gr.Row():
        by_text = gr.Button("Search", variant="primary")
        by_photo = gr.Button("Images like the photo")
    gr.HTML("The most similar first. Click on an image to enlarge it.", elem_classes="hint")
    found = _gallery("found")

    def show(hits: list[Hit]) -> list[tuple[Any, str]]:
        found: list[tuple[Any, str]] = []
        for hit in hits:
            with suppress(DataError):  # gone since it was indexed
                found.append((_thumbnail(hit.path), f"{len(found) + 1}. {hit.path.stem}"))
            if len(found) == FOUND:
                break
        if hits and not found:
            raise DataError(GONE)
        return found

    def on_text(text: str, by_decoder: bool) -> list[tuple[Any, str]]:
        hits = index.query(text, RERANKED)
        note = cut_note(model.tokenizer, text)
        if note:
            gr.Info(note)
        ranked = rerank_images(model, hits, text) if by_decoder else hits
        if hits and not ranked:
            raise DataError(GONE)
        return show(ranked)

    def on_photo(path: str | None) -> list[tuple[Any, str]]:
        hits = index.query(read_photo(_require_photo(path)), RERANKED)
        return show([hit for hit in hits if hit.score < SAME])

    options: dict[str, Any] = {"outputs": found, "concurrency_id": "model"}
    for event in (by_text.click, query.submit):
        _busy(event, by_text, "Searching …", on_text, [], inputs=[query, decoder], api_name="search", **options)
    _busy(by_photo.click, by_photo, "Searching …", on_photo, [], inputs=photo, api_name="search_by_photo", **options)


# Parts


def _busy(
    event: Trigger, button: gr.Button, says: str, function: Callable[..., Any], empty: Any, *args: Any, **options: Any
) -> None:
    """Calls the function on the event; meanwhile the button says what is going on and cannot be pressed. Mistakes of
    the user are shown on the page, and `empty` takes the place of earlier results.
    """

    @functools.wraps(function)
    def careful(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (DataError, ValueError) as error:
            gr.Warning(_as_text(error), duration=None)
            return empty

    label = button.value
    quiet = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    began = event(lambda: gr.Button(says, interactive=False), outputs=button, **quiet)
    ended = began.then(careful, *args, **options)
    ended.then(lambda: gr.Button(label, interactive=True), outputs=button, **quiet)


def _as_text(error: Exception) -> str:
    """The message of an error, which may quote a query or the name of a file: gradio would render its HTML."""
    return escape(str(error), quote=False)


def _gallery(name: str, value: list[Any] | None = None, allow_preview: bool = True) -> gr.Gallery:
    return gr.Gallery(
        value,
        elem_id=name,
        show_label=False,
        buttons=[],
        columns=4,
        height="auto",
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
    """Heading of the page: the model, its size and where it comes from, and in a line what it knows."""
    size = f"{sum(part_sizes(model).values()) / 1e6:,.1f} M parameters, images of {model.image_size} pixels"
    notes = []
    known = released(checkpoint)
    if known is not None:
        size += f", OpenCLIP's weights, downloaded once from {known.repo}"
        notes += [escape(known.note)] if known.note else []
    if vocabulary is None:
        notes.append("It reads texts of any words, in the languages that it was trained on.")
    elif knows_only_scenes(model):
        notes.append("It knows coloured shapes, one beside or above the other, and <b>nothing about photos</b>.")
    else:
        notes.append(f"It knows {len(vocabulary):,} words; what has no word among these it takes for something else.")
    if checkpoint == "photos":
        notes.append("It was trained on 6,000 photos, of people and dogs: captions of other photos are mostly wrong.")
    if builtin:
        notes.append("This is the <b>built-in demo model</b>; <code>coca-demo</code> alone shows a model of photos.")
    words = f"<details><summary>its words</summary>{escape(', '.join(vocabulary))}</details>" if vocabulary else ""
    origin = f"<p>Model: <code>{escape(checkpoint)}</code>, {escape(size)}</p>"
    return f'<h1>Contrastive Captioner</h1>{origin}<div class="note">{" ".join(notes)}{words}</div>'


def _caption_table(candidates: Iterable[Candidate], weight: float, logit_scale: float) -> str:
    """The first caption in large letters, with a picture per word of where it comes from; below, all captions with
    their scores in words, in the given order, what tells the second from the first, and what the scores mean.
    """
    candidates = list(candidates)
    body = ""
    fits, best_by = (shares([c.score(w, logit_scale) for c in candidates]) for w in (1.0, weight))
    for c, fit, both in zip(candidates, fits, best_by, strict=True):
        sure = next(word for least, word in SURE if c.sureness >= least)
        body += (
            f"<tr{'' if body else ' class=first'}><td>{escape(c.caption) or '(empty)'}</td>"
            f"<td title='log-probability {c.log_prob:.3f}'>{sure}, {c.sureness:.0%}</td>"
            f"<td title='cosine {c.similarity:.3f}'>{fit:.0%}</td><td>{both:.0%}</td></tr>"
        )
    head = "".join(f"<th>{name}</th>" for name in ("caption", "sure of its words", "fits the photo", "best"))
    best = escape(candidates[0].caption) or "(empty)"
    looked = "".join(
        f'<figure><img src="{picture}" alt=""><figcaption>{escape(word)}</figcaption></figure>'
        for word, picture in candidates[0].words
    )
    hint = "Bright: where each word comes from. This is a hint, not proof."
    maps = f'<div class="maps">{looked}</div><div class="hint">{hint}</div>' if looked else ""
    why = f"<p>The second one is {escape(reason)}.</p>" if (reason := why_second(candidates)) else ""
    return (
        f'<div class="best">{best}</div>{maps}<table class="captions"><tr>{head}</tr>{body}</table>'
        f'{why}<div class="hint">{SCORES}</div>'
    )


# Serving


def serve(page: gr.Blocks, port: int | None, open_browser: bool = False, wait: bool = True) -> str:
    """Serves the page on 127.0.0.1 until the process is stopped, or in the background without `wait`.

    Args:
        port: None takes a free one.

    Returns:
        The address of the page.

    Raises:
        ConfigError: the port is taken, or none is free.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # logs each of our own requests
    try:
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            **LOOK,
            app_kwargs={
                "middleware": [
                    Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False),
                    Middleware(BaseHTTPMiddleware, dispatch=_only_here),
                ]
            },
        )
    except OSError as error:
        if port is None:
            raise ConfigError(f"no port is free ({error}): choose one, e.g. port=9000") from error
        raise ConfigError(f"port {port} is taken; choose another one, e.g. port={port + 1}") from error
    print(f"the page is at {address} (Ctrl+C ends it)", flush=True)
    if wait:
        page.block_thread()
    return address


async def _only_here(request: Request, call_next: Callable[[Request], Any]) -> Response:
    response: Response = await call_next(request)
    response.headers["Content-Security-Policy"] = POLICY
    return response
