"""Images with a class for every pixel."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from coca_lit.data.records import Record
from coca_lit.data.scenes.render import SHAPES, decode, layout, scene_records


class Segmentation(NamedTuple):
    """A data set of masks; each is made when it is asked for."""

    records: Sequence[Record]
    masks: Sequence[Callable[[], np.ndarray]]  # class numbers (H, W) of each record
    class_names: tuple[str, ...]


def scene_shapes(split: str, size: int = 32, count: int | None = None) -> Segmentation:
    """Built-in scenes whose classes are the background and the shapes, with the arguments of `scene_records`."""
    records = scene_records(split, size, count)
    masks = [partial(_shape_mask, int(record.id), size) for record in records]
    return Segmentation(records, masks, ("background", *SHAPES))


def regions(number: int, size: int = 32) -> Image.Image:
    """Which thing of a scene of two each pixel shows (mode L): 0 the background, 1 the first thing, and so on."""
    _, things = layout(number, size)
    image = Image.new("L", (size, size))
    for place, (_, corner, mask) in enumerate(things, start=1):
        image.paste(place, corner, mask.point(lambda opacity: 255 * (opacity >= 128)))
    return image


def _shape_mask(number: int, size: int) -> np.ndarray:
    names = list(SHAPES)
    classes = [0, *(1 + names.index(thing.shape) for thing in decode(number).things)]
    return np.array(classes)[np.asarray(regions(number, size))]
