"""Clips: F frames in the place of an image. The image encoder sees each by itself, and the pooling all of a clip."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

FramePooling = Literal["tokens", "mean"]


@dataclass(frozen=True, eq=False)
class EncodedFrames:
    """A batch of clips after an image encoder.

    Attributes:
        rows: tokens (B, F, S, C).
    """

    rows: Tensor

    # What a batch of pixels, a tensor, does too.

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.rows.to(device))


def joined(encoded: Tensor | EncodedFrames) -> Tensor:
    """The tokens of all frames of a clip, one frame after the other (B, F · S, C); those of an image as they are."""
    return encoded.rows.flatten(1, 2) if isinstance(encoded, EncodedFrames) else encoded
