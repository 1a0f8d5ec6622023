"""Clips as images of records: files, and members of shards. A model gets some of their frames."""

import random
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coca_lit.data.inputs import ImageReader
from coca_lit.data.sources import ImageSource, TrainTransform, Transform, as_tensor
from coca_lit.errors import DataError, whole_number
from coca_lit.files import state_of
from coca_lit.models.inputs import Images
from coca_lit.projects.video.decoding import read_frames
from coca_lit.projects.video.inputs import Clips, frame_pooling_of
from coca_lit.reading import open_regular

ENDINGS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")


class Clip(ImageSource):
    """A moving picture as the image of a record. A model gets its frames; the picture to look at is the frame in its
    middle.

    Attributes:
        count: frames that a model gets.
    """

    count: int

    @abstractmethod
    def frames(self, count: int | None = None) -> Iterator[Image.Image]:
        """`count` frames, by default the model's, uniformly in time; raises `DataError`."""

    def __call__(self) -> Image.Image:
        return next(iter(self.frames(1)))

    def transformed(self, transform: Transform) -> Images:
        return _clip_of([transform(frame) for frame in self.frames()])

    def augmented(self, transform: TrainTransform, rng: random.Random, budget: int | None = None) -> Images:
        """All frames have the same crop."""
        seed = rng.random()
        frames = (as_tensor(np.array(frame.convert("RGB"))) for frame in self.frames())
        return _clip_of([transform(frame, random.Random(seed), budget) for frame in frames])

    def blank(self, transform: Transform) -> Images:
        return _clip_of([super().blank(transform)] * self.count)

    def why_not_cached(self, net: Any) -> str | None:
        by_frame = frame_pooling_of(net.pooling) == "mean" or net.pooling.added or net.pooling.left_out
        if not by_frame and net.image_encoder.frozen_part() is net.image_encoder:
            return None
        return (
            "features of clips are cached for frame_pooling=tokens without frame_positions, of a whole frozen encoder, "
            "and not for a pooler that leaves out class tokens: set these, or cached_augmentations=0"
        )

    def conditions(self, model: Any) -> dict[str, Any]:
        pooling = getattr(model, "pooling", None)  # a CLIP has none
        return {"frames": self.count, "frame_pooling": "mean" if pooling is None else frame_pooling_of(pooling)}


def _clip_of(frames: list[Images]) -> Clips:
    pixels = [frame for frame in frames if isinstance(frame, Tensor)]
    if len(pixels) < len(frames):
        raise DataError("clips need a model whose images have one shape: use another image encoder")
    return Clips(torch.stack(pixels))


@dataclass(frozen=True)
class ClipFile(Clip):
    """A clip on disk."""

    path: Path
    count: int
    is_file: ClassVar[bool] = True

    def state(self) -> tuple[int, ...]:
        return state_of(self.path)

    def frames(self, count: int | None = None) -> Iterator[Image.Image]:
        try:
            with open_regular(self.path) as file:
                yield from read_frames(file, self.path, count or self.count)
        except OSError as error:
            raise DataError(f"{self.path} is not a readable clip: {error}") from error


@dataclass(frozen=True)
class EncodedClip(Clip):
    """A clip in memory."""

    content: bytes
    name: str
    count: int

    def frames(self, count: int | None = None) -> Iterator[Image.Image]:
        return read_frames(BytesIO(self.content), self.name, count or self.count)


class ClipReader(ImageReader):
    """Reads clips.

    Args:
        frames: of each that a model sees, uniformly in time.
    """

    kind = "clip"
    endings = ENDINGS
    suffixes = tuple(ending.removeprefix(".") for ending in ENDINGS)
    pictures = "frames of a clip, uniform in time"
    prompts = ("a video of {}.",)

    def __init__(self, frames: int) -> None:
        self.frames = whole_number("frames", frames, at_least=1)
        self.leading = (self.frames,)

    def file(self, path: Path) -> ImageSource:
        return ClipFile(path, self.frames)

    def member(self, content: bytes, name: str) -> ImageSource:
        return EncodedClip(content, name, self.frames)

    def batch(self, pixels: Tensor) -> Images:
        return Clips(pixels)
