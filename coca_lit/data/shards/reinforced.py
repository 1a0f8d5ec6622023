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
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from coca_lit.data.batch import Batch
from coca_lit.data.shards.training import Sample
from coca_lit.data.transforms import Box, resized
from coca_lit.distributed import stable_seed
from coca_lit.errors import DataError
from coca_lit.files import replacing
from coca_lit.losses.distillation import Teacher
from coca_lit.reading import parse_json

SUFFIX = ".teachers.safetensors"
ABOUT = "coca_lit"  # key of the metadata
OPEN = 1024  # files that a process keeps mapped


class Reinforced:
    """The file of one shard, mapped into memory.

    Raises:
        DataError: it is missing, or `coca-data teach` did not write it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not path.is_file():  # also a FIFO, which would block
                raise ValueError("there is no such file")
            self._file = safe_open(path, framework="pt")
            self.about: dict[str, Any] = parse_json((self._file.metadata() or {})[ABOUT], str(path), dict)
            self.scales = [float(scale) for scale in self.about["logit_scales"]]
            self._keys: Tensor = self._file.get_tensor("keys")
            sides = [f"{side}.{k}" for side in ("images", "texts") for k in range(len(self.scales))]
            self._parts = {name: self._file.get_slice(name) for name in ("captions", "boxes", *sides)}
            shapes = {name: part.get_shape() for name, part in self._parts.items()}
            self.views = shapes["boxes"][1]
            rows = {"boxes": [len(self._keys), self.views], "captions": [len(self._keys), *shapes["captions"][1:]]}
            rows |= {name: rows["captions" if name.startswith("texts") else "boxes"] for name in sides}
            if rows != {name: shape[:2] for name, shape in shapes.items()} or shapes["boxes"][2:] != [4]:
                raise ValueError("the tensors do not fit each other")
        except Exception as error:  # of safetensors, or of what it holds
            raise DataError(f"{path} holds no embeddings ({error}): write it with coca-data teach") from error

    def row(self, key: str) -> int:
        """Where the sample is; raises `DataError` if it is not there."""
        wanted = stable_seed(key)
        row = int(torch.searchsorted(self._keys, wanted))
        if row == len(self._keys) or self._keys[row] != wanted:
            raise DataError(f"{self.path} lacks the sample {key}: remove it, and repeat coca-data teach")
        return row

    def box(self, row: int, view: int) -> Box:
        return Box(*self._parts["boxes"][row, view].tolist())

    def teachers(self, row: int, view: int, caption: str) -> tuple[Teacher, ...]:
        """The embeddings (E,) of a crop and of a caption by each teacher; raises `DataError` for an unknown text."""
        captions = self._parts["captions"][row].tolist()
        try:
            place = captions.index(stable_seed(caption))
        except ValueError as error:
            raise DataError(
                f"{self.path} has no embedding of the caption {caption[:80]!r}: name its field in --caption-keys of "
                "coca-data teach"
            ) from error
        images, texts = ([self._parts[f"{side}.{k}"] for k in range(len(self.scales))] for side in ("images", "texts"))
        return tuple(
            Teacher(image[row, view], text[row, place], scale)
            for image, text, scale in zip(images, texts, self.scales, strict=True)
        )


opened = lru_cache(maxsize=OPEN)(Reinforced)
"""As a mapping of the file does not travel to other processes, each opens its own."""


def reinforced_path(shard: str, folder: Path) -> Path:
    """Where the embeddings of a shard, a path or URL, are."""
    return folder / f"{shard.rpartition('/')[2].removesuffix('.tar')}{SUFFIX}"


def check_reinforced(path: Path, shard_bytes: int, first: Path) -> None:
    """Raises `DataError` if there are no embeddings, or they were made from another version of the shard, or by other
    teachers than those of the `first` file.
    """
    about, other = opened(path).about, opened(first).about
    if about.get("bytes") != shard_bytes:
        raise DataError(f"the shard of {path} has changed since: remove the file, and repeat coca-data teach")
    if any(about.get(name) != other.get(name) for name in ("teachers", "precision")):
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
    row, view = file.row(sample.key), rng.randrange(file.views)
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
    scales = batch.extras.get("teachers.scales", [()])[0]
    return [
        Teacher(batch.extras[f"teachers.{k}.images"], batch.extras[f"teachers.{k}.texts"], scale)
        for k, scale in enumerate(scales)
    ]


def write_reinforced(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes a file whole, with the rows in the order of their keys.

    Args:
        about: "logit_scales" of the teachers, "bytes" of the shard, and whatever made the file.

    Raises:
        DataError: nothing can be written there.
    """
    order = tensors["keys"].argsort()
    with replacing(path) as temporary:
        save_file({name: x[order].contiguous() for name, x in tensors.items()}, temporary, {ABOUT: json.dumps(about)})
