"""What teachers say of the samples of a shard (reinforced data: MobileCLIP, Vasu et al. 2024, arXiv 2311.17049):
NAME.teachers.safetensors, which `coca-data teach` writes. Training replays the crops that the teachers have seen.

Of each of N usable samples it has V crops, C captions, and the embeddings of both by each teacher:

    keys        (N,) int64, ascending: `stable_seed` of the sample's key
    captions    (N, C) int64: `stable_seed` of each text, 0 where a sample has fewer
    boxes       (N, V, 4) int32: each crop as a `Box`
    images.K    (N, V, E) fp16, of teacher K
    texts.K     (N, C, E) fp16
"""

import json
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from coca_lit.data.batch import Batch
from coca_lit.data.shards.index import TarIndex
from coca_lit.data.shards.training import Sample, SampleStep
from coca_lit.data.sources import TrainTransform
from coca_lit.data.transforms import Box, RandomCrop, resized
from coca_lit.distributed import stable_seed
from coca_lit.errors import DataError
from coca_lit.files import replacing
from coca_lit.projects.distillation.loss import Teacher
from coca_lit.reading import parse_json

SUFFIX = ".teachers.safetensors"
ABOUT = "coca_lit"  # key of the metadata
OPEN = 1024  # files that a process keeps mapped


class Reinforced:
    """The file of one shard, mapped into memory.

    Attributes:
        about: what made it, and the "bytes" of the shard.
        views: crops of each image.

    Raises:
        DataError: it is missing, or `coca-data teach` did not write it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._open()
        except Exception as error:  # of safetensors, or of what it holds
            raise DataError(f"{path} holds no embeddings ({error}): write it with coca-data teach") from error

    def _open(self) -> None:
        if not self.path.is_file():  # also a FIFO, which would block
            raise ValueError("there is no such file")
        file = safe_open(self.path, framework="pt")
        self.about: dict[str, Any] = parse_json((file.metadata() or {})[ABOUT], str(self.path), dict)
        self._scales = [float(scale) for scale in self.about["logit_scales"]]
        self._keys: Tensor = file.get_tensor("keys")
        self._captions = file.get_slice("captions")
        self._boxes = file.get_slice("boxes")
        self._images = [file.get_slice(f"images.{k}") for k in range(len(self._scales))]
        self._texts = [file.get_slice(f"texts.{k}") for k in range(len(self._scales))]
        samples = len(self._keys)
        self.views = self._boxes.get_shape()[1]
        captions = self._captions.get_shape()[1]
        fits = self._boxes.get_shape() == [samples, self.views, 4] and self._captions.get_shape() == [samples, captions]
        for images, texts in zip(self._images, self._texts, strict=True):
            fits = fits and images.get_shape()[:2] == [samples, self.views]
            fits = fits and texts.get_shape()[:2] == [samples, captions]
        if not fits:
            raise ValueError("the tensors do not fit each other")

    def row(self, key: str) -> int:
        """Where the sample is; raises `DataError` if it is not there."""
        wanted = stable_seed(key)
        row = int(torch.searchsorted(self._keys, wanted))
        if row == len(self._keys) or self._keys[row] != wanted:
            raise DataError(f"{self.path} lacks the sample {key}: remove it, and repeat coca-data teach")
        return row

    def box(self, row: int, view: int) -> Box:
        return Box(*self._boxes[row, view].tolist())

    def teachers(self, row: int, view: int, caption: str) -> tuple[Teacher, ...]:
        """The embeddings (E,) of a crop and of a caption by each teacher; raises `DataError` for an unknown text."""
        captions = self._captions[row].tolist()
        try:
            place = captions.index(stable_seed(caption))
        except ValueError as error:
            raise DataError(
                f"{self.path} has no embedding of the caption {caption[:80]!r}: name its field in --caption-keys of "
                "coca-data teach"
            ) from error
        return tuple(
            Teacher(images[row, view], texts[row, place], scale)
            for images, texts, scale in zip(self._images, self._texts, self._scales, strict=True)
        )


opened = lru_cache(maxsize=OPEN)(Reinforced)
"""As a mapping of the file does not travel to other processes, each opens its own."""


def reinforced_path(shard: str, folder: Path) -> Path:
    """Where the embeddings of a shard, a path or URL, are."""
    file_name = shard.rpartition("/")[2]
    return folder / f"{file_name.removesuffix('.tar')}{SUFFIX}"


# In training


def replaying(folder: str, transform: TrainTransform, indexes: Sequence[TarIndex]) -> SampleStep:
    """The sample step of `data.teachers`, see `replayed`.

    Args:
        folder: of the files.

    Raises:
        DataError: the model takes no square images; or there is no file of a shard, one of another version of it, one
            for two shards, or one of other teachers than those of the first.
    """
    if not isinstance(transform, RandomCrop):
        raise DataError("data.teachers has square crops: it needs an image encoder that takes squares")
    shards: dict[Path, str] = {}  # by their file
    for index in indexes:
        shard = index.shard.name
        path = reinforced_path(shard, Path(folder))
        other = shards.setdefault(path, shard)
        if other != shard:
            raise DataError(
                f"data.teachers has one file for {other} and {shard}, which have the same file name: rename one of "
                "them, and repeat coca-data teach"
            )
        _check_file(path, index.stamp.bytes, first=next(iter(shards)))
    return partial(replayed, Path(folder), transform.size)


def _check_file(path: Path, shard_bytes: int, first: Path) -> None:
    about = opened(path).about
    of_first = opened(first).about
    if about.get("bytes") != shard_bytes:
        raise DataError(f"the shard of {path} has changed since: remove the file, and repeat coca-data teach")
    if any(about.get(name) != of_first.get(name) for name in ("teachers", "precision")):
        raise DataError(f"{first} and {path} are of other teachers: remove one of them, and repeat coca-data teach")


def replayed(folder: Path, size: int, sample: Sample, rng: random.Random) -> tuple[Tensor, dict[str, Any]]:
    """A random one of the crops that teachers have seen, as (3, size, size) uint8, and what they say of it and of the
    caption, for `teachers_of`.

    Args:
        folder: of the files.
        size: height and width in pixels; a teacher has seen the same box in its own size.

    Raises:
        DataError: nothing is stored of that sample or caption.
    """
    file = opened(reinforced_path(sample.shard, folder))
    row = file.row(sample.key)
    view = rng.randrange(file.views)
    crop = resized(sample.pixels, file.box(row, view), (size, size))
    return crop, as_extras(file.teachers(row, view, sample.caption))


def as_extras(teachers: Sequence[Teacher]) -> dict[str, Any]:
    """What teachers say of one sample, (E,) each, or of a batch, (B, E) each, by names."""
    extras: dict[str, Any] = {"teachers.scales": tuple(teacher.logit_scale for teacher in teachers)}
    for k, teacher in enumerate(teachers):
        extras[f"teachers.{k}.images"] = teacher.images
        extras[f"teachers.{k}.texts"] = teacher.texts
    return extras


def teachers_of(batch: Batch) -> list[Teacher]:
    """What teachers say of a batch, fp16; empty if there are none."""
    if "teachers.scales" not in batch.extras:
        return []
    scales = batch.extras["teachers.scales"][0]  # of any sample: they are equal
    return [
        Teacher(batch.extras[f"teachers.{k}.images"], batch.extras[f"teachers.{k}.texts"], scale)
        for k, scale in enumerate(scales)
    ]


# In `coca-data teach`


def write_reinforced(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes a file whole, with the rows in the order of their keys.

    Args:
        about: "logit_scales" of the teachers, "bytes" of the shard, and whatever made the file.

    Raises:
        DataError: nothing can be written there.
    """
    order = tensors["keys"].argsort()
    in_order = {name: x[order].contiguous() for name, x in tensors.items()}
    with replacing(path) as temporary:
        save_file(in_order, temporary, {ABOUT: json.dumps(about)})
