"""Readers of what stands for the image of a record: of images, and of the kinds of input that projects declare.

A project declares the endings of the files of a kind (`[inputs]` of its `project.toml`), each with a subclass of
`ImageReader`, and the arguments of that class (`[input_options]`), which are keys of commands and of shards.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from coca_lit import extensions
from coca_lit.data.pixels import SUFFIXES
from coca_lit.data.records import ImageFile
from coca_lit.data.sources import EncodedImage, ImageSource
from coca_lit.models.inputs import Images


class ImageReader:
    """Reads images; a subclass reads another kind of input.

    Attributes:
        kind: what people call one.
        endings: of files, in lower case.
        suffixes: of members of shards.
        leading: sizes in front of (3, H, W), for an input that has several pictures.
        pictures: what these are, for people.
        prompts: for zero-shot classification, with {} for the name of a class.
    """

    kind = "image"
    endings: tuple[str, ...] = SUFFIXES
    suffixes: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    leading: tuple[int, ...] = ()
    pictures = ""
    prompts: tuple[str, ...] = ("a photo of a {}.",)

    def __eq__(self, other: object) -> bool:
        """Equal are readers of one class and the same options, also of two processes."""
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash(type(self))

    def file(self, path: Path) -> ImageSource:
        return ImageFile(path)

    def member(self, content: bytes, name: str) -> ImageSource:
        """Of a shard; `name` is for errors."""
        return EncodedImage(content, name)

    def batch(self, pixels: Tensor) -> Images:
        """A batch for a model, of pixels (B, *leading, 3, H, W)."""
        return pixels


IMAGES = ImageReader()


def other_endings() -> tuple[str, ...]:
    """The endings of files of all declared kinds."""
    return tuple(extensions.declared("inputs"))


def reader_of(ending: str, options: Mapping[str, Any] | None = None) -> ImageReader:
    """The reader of files with this ending; that of images for one that no project declares.

    Args:
        options: of declared readers, by name; those that are missing have their defaults.
    """
    target = extensions.declared("inputs").get(ending.lower())
    if target is None:
        return IMAGES
    values = {
        name: (options or {}).get(name, option.default)
        for name, option in extensions.input_options().items()
        if option.reader == target
    }
    return _built(target, tuple(values.items()))


@functools.cache
def _built(target: str, values: tuple[tuple[str, Any], ...]) -> ImageReader:
    reader: ImageReader = extensions.load(target)(**dict(values))
    return reader


def source_of(path: Path, options: Mapping[str, Any] | None = None) -> ImageSource:
    """What reads a file, by its ending."""
    return reader_of(path.suffix, options).file(path)


def chosen_reader(options: Mapping[str, Any]) -> ImageReader:
    """The declared reader of which an option is given and not 0; else that of images.

    Raises:
        ValueError: options of several readers.
    """
    chosen = {name: option for name, option in extensions.input_options().items() if options.get(name)}
    targets = {option.reader for option in chosen.values()}
    if len(targets) > 1:
        raise ValueError(f"{' and '.join(chosen)} belong to different kinds of input: leave one of them out")
    for ending, target in extensions.declared("inputs").items():
        if target in targets:
            return reader_of(ending, options)
    return IMAGES
