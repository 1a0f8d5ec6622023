"""Images with a class: a folder per class, or the built-in scenes.

Class names and prompt templates are data: a JSON file {"classes": {folder: name}, "templates": ["a photo of a {}."]}.
"""

import logging
import os
import random
from collections.abc import Hashable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from coca_lit import extensions
from coca_lit.data.inputs import IMAGES, chosen_reader
from coca_lit.data.records import Record, not_found
from coca_lit.data.scenes.render import (
    AXES,
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    captions,
    encode,
    render,
    scene_records,
)
from coca_lit.errors import DataError
from coca_lit.reading import printable, read_json

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parents[2] / "assets"
HOW = "one folder of images per class is expected there"


class Classification(NamedTuple):
    """A classification data set. The records come in random order, so that the first few are a fair sample."""

    records: list[Record]
    labels: Mapping[Hashable, int]  # record id -> class number
    class_names: tuple[str, ...]
    templates: tuple[str, ...]  # prompts with {} for the name


def image_folder(
    root: str | Path,
    classes: str | Path | None = None,
    subset: bool = False,
    **inputs: Annotated[Any, extensions.INPUT_OPTIONS],
) -> Classification:
    """Images of root/FOLDER/*.jpg, a folder per class.

    Args:
        root: folder of the folders.
        classes: JSON file of names and templates, see above, or "imagenet" for that of ImageNet-1k. It may name more
            classes than there are folders: all are candidates. By default a folder's name is its class's, with blanks
            for underscores, and the template is "a photo of a {}." Folders 0, 1, … of ImageNet-V2 are the classes in
            the order of the file.
        subset: only classes that have a folder are candidates: the 200 of ImageNet-A and ImageNet-R.
        inputs: an option of another kind of input than images, which is then read in place of images.

    Raises:
        DataNotFoundError: there are no such folders, or no images in them.
        DataError: the JSON file cannot be used, or does not name a folder.
    """
    root = Path(root)
    reader = chosen_reader(inputs)
    folders = folders_of_classes(root)
    usual = ({f: f.replace("_", " ") for f in folders}, reader.prompts)
    names, templates = read_classes(classes) if classes else usual
    if not names.keys() & set(folders):
        names = {str(number): name for number, name in enumerate(names.values())}
    unknown = [folder for folder in folders if folder not in names]
    if unknown:
        raise DataError(
            f"{classes} names no class for {len(unknown)} of {len(folders)} folders of {root}, e.g. {unknown[0]}"
        )
    if subset:
        names = {folder: name for folder, name in names.items() if folder in set(folders)}
    files = [(name, f"{name}/{file}") for name in folders for file in sorted(_names(root / name))]
    images = [(folder, file) for folder, file in files if file.lower().endswith(reader.endings)]
    if not images:
        raise not_found("classified images", [root / folders[0]], HOW)
    with_images = {folder for folder, _ in images}
    empty = [folder for folder in folders if folder not in with_images]
    if empty:
        of = f"{len(empty)} of {len(folders)} classes in {root}"
        log.warning("%s have no image, e.g. %s", of, printable(empty[0]))
    unread = [file for _, file in files if not file.lower().endswith(reader.endings)]
    if unread:
        log.warning("left out %d files or folders of classes in %s, e.g. %s", len(unread), root, printable(unread[0]))
    random.Random(0).shuffle(images)
    number = {folder: i for i, folder in enumerate(names)}
    records = [Record(file, reader.file(root / file)) for _, file in images]
    return Classification(records, {file: number[folder] for folder, file in images}, tuple(names.values()), templates)


def folders_of_classes(root: Path) -> list[str]:
    """Raises `DataNotFoundError` if there are none."""
    folders = sorted(name for name in _names(root) if (root / name).is_dir()) if root.is_dir() else []
    if not folders:
        raise not_found("classified images", [root], HOW)
    return folders


def _names(folder: Path) -> list[str]:
    """What is in a folder, but for hidden files and folders, such as `.ipynb_checkpoints`."""
    return [name for name in os.listdir(folder) if not name.startswith(".")]


def read_classes(path: str | Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Class names by folder, and templates, of a JSON file, or of ImageNet for "imagenet"."""
    path = ASSETS / "imagenet.json" if path == "imagenet" else Path(path)
    content = read_json(path)
    classes = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(classes, dict) or not classes or not all(isinstance(name, str) for name in classes.values()):
        raise DataError(f'{path} must hold {{"classes": {{folder: name}}, "templates": [...]}}, "classes" is missing')
    templates = content.get("templates", IMAGES.prompts)
    templates = tuple(templates) if isinstance(templates, list | tuple) else (templates,)
    if not templates:
        raise DataError(
            f'{path}: "templates" must hold one or more texts with {{}} for the name of the class, got none'
        )
    wrong = [t for t in templates if not isinstance(t, str) or t.count("{}") != 1]
    if wrong:
        raise DataError(f"{path}: each template must hold one {{}} for the name of the class, got {wrong[0]!r}")
    return classes, templates


def scene_classes(size: int = 32, trained: bool = False) -> Classification:
    """Built-in scenes of two objects with the same colour and shape, which is the class.

    The prompts of a class are the captions of such scenes.

    Args:
        trained: those of the training split, else all others.
    """
    known = {record.id for record in scene_records("train")}
    classes = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
    sizes = list(product(AXES, SIZES, SIZES))
    label = {
        encode(Scene(axis, (Thing(first, *kind), Thing(second, *kind)))): i
        for i, kind in enumerate(product(COLOURS, SHAPES))
        for axis, first, second in sizes
    }
    numbers = [number for number in sorted(label) if (number in known) == trained]
    random.Random(0).shuffle(numbers)
    records = [Record(number, partial(render, number, size)) for number in numbers]
    pairs = [Scene(axis, (Thing(first, "C", "S"), Thing(second, "C", "S"))) for axis, first, second in sizes]
    templates = tuple(text.replace("C S", "{}") for pair in pairs for text in captions(pair))
    return Classification(records, {number: label[number] for number in numbers}, classes, templates)
