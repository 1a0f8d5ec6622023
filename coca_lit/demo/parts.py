"""What the tabs have in common: mistakes told on the page, galleries, and images made small enough to be sent."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from coca_lit.demo.answers import read_photo
from coca_lit.errors import DataError

EDGE = 1024  # pixels of the longer side of an image on the page
Trigger = Callable[..., Any]  # an event of gradio, to be listened to


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Shows mistakes of the user on the page; the page goes on working."""

    @functools.wraps(function)
    def wrapped(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (DataError, ValueError) as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    return wrapped


def gallery(name: str, height: int, value: list[Any] | None = None, allow_preview: bool = True) -> gr.Gallery:
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


def chosen(path: str | None) -> str:
    if path is None:
        raise ValueError("choose a photo first, or click on an example")
    return path


def for_people(path: Path) -> Image.Image:
    image = read_photo(path)
    image.thumbnail((EDGE, EDGE))
    return image
