"""Images with their classes as captions: labels of a classifier, or texts that a network learns as captions."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from coca_lit import extensions
from coca_lit.data.datasets.classification import (
    Classification,
    folders_of_classes,
    image_folder,
    read_classes,
    scene_classes,
)
from coca_lit.data.records import Record


def class_records(
    root: str | Path,
    split: str,
    classes: str | Path | None = None,
    as_text: bool = False,
    **inputs: Annotated[Any, extensions.INPUT_OPTIONS],
) -> list[Record]:
    """Images of root/SPLIT/FOLDER/*.jpg with their classes as captions, to train on.

    Args:
        root: folder of train/ and val/, each with a folder per class.
        split: one of these.
        classes: names and templates, as of `image_folder`.
        as_text: the captions are the templates with the name, such as "a photo of a dog."; else the label alone, see
            `class_labels`.
        inputs: as of `image_folder`.
    """
    images = image_folder(Path(root) / split, classes, **inputs)
    if as_text:
        return captioned(
            images, [[template.replace("{}", c) for template in images.templates] for c in images.class_names]
        )
    return captioned(images, [[label] for label in _distinct(images.class_names)])


def class_labels(root: str | Path, classes: str | Path | None = None) -> list[str]:
    """The labels of `class_records`: the names of the classes, with their number where two have the same name, as two
    pairs of ImageNet's have. Without a file of names, the names of the folders.
    """
    if classes is not None:
        return _distinct(tuple(read_classes(classes)[0].values()))
    return _distinct([name.replace("_", " ") for name in folders_of_classes(Path(root) / "train")])


def _distinct(names: Sequence[str]) -> list[str]:
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({i})" for i, name in enumerate(names)]


def captioned(images: Classification, captions: Sequence[Sequence[str]]) -> list[Record]:
    """The records with the captions of their class (CoCa treats labels as texts, arXiv 2205.01917, section 3.2)."""
    return [record._replace(captions=tuple(captions[images.labels[record.id]])) for record in images.records]


def scene_class_records(split: str, size: int = 32) -> list[Record]:
    """Training scenes with a class, each with the name of its class as text; none in other splits."""
    images = scene_classes(size, trained=True)
    return captioned(images, [[f"a {name}"] for name in images.class_names]) if split == "train" else []
