"""Images with a class for every pixel."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from coca_lit.data.records import Record
from coca_lit.data.scenes.render import SHAPES, decode, regions, scene_records


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


def _shape_mask(number: int, size: int) -> np.ndarray:
    classes = [0, *(1 + tuple(SHAPES).index(thing.shape) for thing in decode(number).things)]
    return np.array(classes)[np.asarray(regions(number, size))]
