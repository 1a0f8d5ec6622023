"""The page: a photo on the left, what the model makes of it on the right."""

from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from coca_lit.demo.answers import read_photo
from coca_lit.demo.look import banner
from coca_lit.demo.parts import Trigger, for_people, gallery, told
from coca_lit.demo.tabs import caption_tab, classification_tab, search_tab
from coca_lit.errors import DataError
from coca_lit.inference.search import ImageIndex
from coca_lit.models import CoCa
from coca_lit.tokenizer import WordTokenizer

EXAMPLES = 8


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
                    caption_tab(model, photo, news)
                with gr.Tab("Classification"):
                    classification_tab(model, photo, vocabulary is not None)
                with gr.Tab("Search"):
                    search_tab(index, photo)
    return page


def _photo(index: ImageIndex | None) -> tuple[gr.Image, list[Trigger]]:
    """The photo, and the events after which there is a new one that can be read."""
    photo = gr.Image(
        label="photo",
        sources=["upload", "clipboard"],
        type="filepath",
        image_mode=None,  # the file as it is
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
    news: list[Trigger] = [upload.success]
    if index is not None:
        paths = _spread(index.paths, EXAMPLES)
        gr.HTML("Examples", elem_classes="hint")
        pictures = [for_people(path) for path in paths]
        examples = gallery("examples", height=250, value=pictures, allow_preview=False)

        @told
        def on_select(event: gr.SelectData) -> Image.Image:
            return for_people(paths[event.index])

        news.append(examples.select(on_select, outputs=photo, show_progress="hidden", api_visibility="private").success)
    return photo, news


def _spread(paths: list[Path], count: int) -> list[Path]:
    return paths[:: max(len(paths) // count, 1)][:count]
