"""The page: a photo on the left, what the model makes of it on the right. It is served to this machine alone."""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response

from coca_lit.apply.search import Hit, ImageIndex
from coca_lit.config import ConfigError
from coca_lit.data.records import DataError
from coca_lit.demo.answers import Candidate, Strategy, classify, rank, read_photo, write_captions
from coca_lit.demo.look import EMPTY, FONTS, STYLE, banner, caption_table
from coca_lit.models import CoCa
from coca_lit.models.generate import DEFAULT_RERANK_WEIGHT
from coca_lit.tokenizer import WordTokenizer

HOST = "127.0.0.1"
MAX_UPLOAD = "30mb"
SCENE_WORDS = "circle, square, triangle, star, cross, ring"
PHOTO_WORDS = "dog, cat, person, car, landscape"
EXAMPLES = 8
FOUND = 12
EDGE = 1024  # pixels of the longer side of an image on the page
Trigger = Callable[..., Any]  # an event of gradio, to be listened to
# The browser refuses whatever a library might want from another machine.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def build_page(model: CoCa, checkpoint: str, index: ImageIndex | None, builtin: bool = False) -> gr.Blocks:
    """The page of a model in evaluation mode; `index` is the folder to search, its first images are the examples."""
    vocabulary = model.tokenizer.spec if isinstance(model.tokenizer, WordTokenizer) else None
    with gr.Blocks(title="Contrastive Captioner", analytics_enabled=False) as page:
        gr.HTML(banner(checkpoint, builtin, vocabulary), elem_id="banner")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2):
                photo, news = _photo(index)
            with gr.Column(scale=3), gr.Tabs():
                with gr.Tab("Captions"):
                    _caption_tab(model, photo, news)
                with gr.Tab("Classification"):
                    _classification_tab(model, photo, vocabulary is not None)
                with gr.Tab("Search"):
                    _search_tab(index, photo)
    return page


def serve(page: gr.Blocks, port: int, open_browser: bool = False, wait: bool = True) -> str:
    """Serves the page at 127.0.0.1, until the process is stopped or, without `wait`, in the background; its address.

    Raises:
        ConfigError: the port is taken.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every look at our own page
    try:
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            max_file_size=MAX_UPLOAD,
            footer_links=[],
            theme=gr.themes.Soft(primary_hue="indigo", font=FONTS, font_mono=["ui-monospace", "monospace"]),
            css=STYLE,
            app_kwargs={"middleware": [Middleware(BaseHTTPMiddleware, dispatch=_only_here)]},
        )
    except OSError as error:
        raise ConfigError(f"port {port} is taken; choose another one: port={port + 1}") from error
    print(f"the page is at {address} (Ctrl+C ends it)", flush=True)
    if wait:
        page.block_thread()
    return address


async def _only_here(request: Request, call_next: Callable[[Request], Any]) -> Response:
    response: Response = await call_next(request)
    response.headers["Content-Security-Policy"] = POLICY
    return response


def _told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Shows mistakes of the user on the page; the page goes on working."""

    @functools.wraps(function)
    def wrapped(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (DataError, ValueError) as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    return wrapped


def _photo(index: ImageIndex | None) -> tuple[gr.Image, list[Trigger]]:
    """The photo, and the events after which there is a new one that can be read."""
    sources = ["upload", "clipboard"]
    photo = gr.Image(
        label="photo", sources=sources, type="filepath", image_mode=None, format="png", height=360, elem_id="photo"
    )

    def on_upload(file: dict[str, Any]) -> str | None:
        try:
            read_photo(file["path"])
        except DataError as error:
            gr.Warning(str(error), duration=None, title="This file is refused")
            return None
        return file["path"]

    # Without gradio's preprocessing our own checks come before any decoder.
    upload = photo.upload(on_upload, photo, photo, preprocess=False, show_progress="hidden", api_visibility="private")
    news = [upload.success]
    if index is not None:
        paths = _spread(index.paths, EXAMPLES)
        gr.HTML("Examples", elem_classes="hint")
        pictures = [_for_people(path) for path in paths]
        examples = _gallery("examples", height=250, value=pictures, allow_preview=False)

        @_told
        def on_select(event: gr.SelectData) -> Image.Image:
            return _for_people(paths[event.index])

        news.append(examples.select(on_select, outputs=photo, show_progress="hidden", api_visibility="private").success)
    return photo, news


def _caption_tab(model: CoCa, photo: gr.Image, news: list[Trigger]) -> None:
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
        value=DEFAULT_RERANK_WEIGHT,
        step=0.05,
        label="order by",
        info="0: the captioner's log-probability, 1: the image-text similarity, and what lies between",
        elem_id="weight",
    )
    write = gr.Button("Write captions", variant="primary")
    answer = gr.HTML(EMPTY, elem_id="captions")
    candidates, draws = gr.State([]), gr.State(0)

    def show(found: list[Candidate], weight: float) -> str:
        return caption_table(rank(found, weight, scale), weight, scale) if found else EMPTY

    @_told
    def on_write(path: str | None, strategy: Strategy, count: int, weight: float, draw: int) -> tuple[Any, ...]:
        if path is None:  # none yet, or what was uploaded is refused
            return [], draw, EMPTY
        found = write_captions(model, read_photo(path), strategy, int(count), seed=draw)
        return found, draw + 1, show(found, weight)

    inputs, outputs = [photo, strategy, count, weight, draws], [candidates, draws, answer]
    for event in (write.click, *news):
        event(on_write, inputs, outputs, concurrency_id="model", api_name="caption")
    photo.clear(lambda: ([], EMPTY), outputs=[candidates, answer], api_visibility="private")
    weight.change(show, [candidates, weight], answer, show_progress="hidden", api_visibility="private")


def _classification_tab(model: CoCa, photo: gr.Image, scenes: bool) -> None:
    words = "circle, square, triangle, star, cross, ring" if scenes else "dog, cat, person, car, landscape"
    labels = gr.Textbox(words, label="labels, separated by commas", lines=2, elem_id="labels")
    template = gr.Textbox(
        "a {}" if scenes else "a photo of a {}", label="template: {} is the label", elem_id="template"
    )
    button = gr.Button("Classify", variant="primary")
    answer = gr.Label(label="probability", num_top_classes=10, elem_id="classes")

    @_told
    def on_classify(path: str | None, labels: str, template: str) -> dict[str, float]:
        return classify(model, read_photo(_chosen(path)), labels.replace("\n", ",").split(","), template)

    gr.on(
        [button.click, labels.submit, template.submit],
        on_classify,
        [photo, labels, template],
        answer,
        concurrency_id="model",
    )


def _search_tab(index: ImageIndex | None, photo: gr.Image) -> None:
    if index is None:
        gr.Markdown("Start the page with a folder to search it: `coca-demo checkpoint=PATH images=FOLDER`")
        return
    label = f"what to look for in the {len(index):,} images of {index.folder}"
    query = gr.Textbox(label=label, placeholder="describe a picture", elem_id="query")
    with gr.Row():
        by_text = gr.Button("Search", variant="primary")
        by_photo = gr.Button("Images like the photo")
    gr.HTML("Best first, with the cosine similarity. Click on an image to enlarge it.", elem_classes="hint")
    found = _gallery("found", height=520)

    def show(hits: list[Hit]) -> list[tuple[Any, str]]:
        return [(_for_people(hit.path), f"{hit.score:.3f} · {hit.path.name}") for hit in hits]

    @_told
    def on_text(text: str) -> list[tuple[Any, str]]:
        return show(index.query(text, FOUND))

    @_told
    def on_photo(path: str | None) -> list[tuple[Any, str]]:
        return show(index.query(read_photo(_chosen(path)), FOUND))

    gr.on([by_text.click, query.submit], on_text, query, found, concurrency_id="model", api_name="search")
    by_photo.click(on_photo, photo, found, concurrency_id="model", api_name="search_by_photo")


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


def _chosen(path: str | None) -> str:
    if path is None:
        raise ValueError("choose a photo first, or click on an example")
    return path


def _for_people(path: Path) -> Image.Image:
    image = read_photo(path)
    image.thumbnail((EDGE, EDGE))
    return image


def _spread(paths: list[Path], count: int) -> list[Path]:
    return paths[:: max(len(paths) // count, 1)][:count]
