"""The three tabs: captions, classification, search."""

from typing import Any

import gradio as gr

from coca_lit.demo.answers import Candidate, Strategy, classify, rank, read_photo, write_captions
from coca_lit.demo.look import EMPTY, caption_table
from coca_lit.demo.parts import Trigger, chosen, for_people, gallery, told
from coca_lit.inference.search import Hit, ImageIndex
from coca_lit.models import CoCa
from coca_lit.models.generation.options import OPTIONS

SCENE_WORDS = "circle, square, triangle, star, cross, ring"
PHOTO_WORDS = "dog, cat, person, car, landscape"
FOUND = 12


def caption_tab(model: CoCa, photo: gr.Image, news: list[Trigger]) -> None:
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
        info="0: the captioner's log-probability, 1: the image-text similarity, and what lies between",
        elem_id="weight",
    )
    write = gr.Button("Write captions", variant="primary")
    answer = gr.HTML(EMPTY, elem_id="captions")
    candidates, draws = gr.State([]), gr.State(0)

    def show(found: list[Candidate], weight: float) -> str:
        return caption_table(rank(found, weight, scale), weight, scale) if found else EMPTY

    @told
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


def classification_tab(model: CoCa, photo: gr.Image, scenes: bool) -> None:
    words, prompt = (SCENE_WORDS, "a {}") if scenes else (PHOTO_WORDS, "a photo of a {}")
    labels = gr.Textbox(words, label="labels", info="separated by commas", elem_id="labels")
    template = gr.Textbox(prompt, label="template", info="{} stands for the label", elem_id="template")
    button = gr.Button("Classify", variant="primary")
    answer = gr.Label(label="probability", num_top_classes=10, elem_id="classes")

    @told
    def on_classify(path: str | None, labels: str, template: str) -> dict[str, float]:
        return classify(model, read_photo(chosen(path)), labels.replace("\n", ",").split(","), template)

    events, inputs = [button.click, labels.submit, template.submit], [photo, labels, template]
    gr.on(events, on_classify, inputs, answer, concurrency_id="model", api_name="classify")


def search_tab(index: ImageIndex | None, photo: gr.Image) -> None:
    if index is None:
        gr.Markdown("Start the page with a folder to search it: `coca-demo checkpoint=PATH images=FOLDER`")
        return
    label = f"what to look for in the {len(index):,} images of {index.folder}"
    query = gr.Textbox(label=label, placeholder="describe a picture", elem_id="query")
    with gr.Row():
        by_text = gr.Button("Search", variant="primary")
        by_photo = gr.Button("Images like the photo")
    gr.HTML("Best first, with the cosine similarity. Click on an image to enlarge it.", elem_classes="hint")
    found = gallery("found", height=520)

    def show(hits: list[Hit]) -> list[tuple[Any, str]]:
        return [(for_people(hit.path), f"{hit.score:.3f} · {hit.path.name}") for hit in hits]

    @told
    def on_text(text: str) -> list[tuple[Any, str]]:
        return show(index.query(text, FOUND))

    @told
    def on_photo(path: str | None) -> list[tuple[Any, str]]:
        return show(index.query(read_photo(chosen(path)), FOUND))

    gr.on([by_text.click, query.submit], on_text, query, found, concurrency_id="model", api_name="search")
    by_photo.click(on_photo, photo, found, concurrency_id="model", api_name="search_by_photo")
