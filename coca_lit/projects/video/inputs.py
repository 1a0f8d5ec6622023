"""Clips as a kind of input: a batch of them, and what an image encoder makes of it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from coca_lit.errors import ConfigError, DataError, check_choice, check_number
from coca_lit.models import CLIP, CoCa, DualEncoder
from coca_lit.models.inputs import Input

FramePooling = Literal["tokens", "mean"]


def set_frame_pooling(model: DualEncoder, frame_pooling: FramePooling) -> None:
    """The option `frame_pooling` of a model. tokens: the poolers see the tokens of all frames (VideoCoCa, Yan et al.
    2022, arXiv 2212.04979). mean: means over the frames of what they make of each (CoCa's zero-shot).

    Raises:
        ValueError: there is no such way, or it is not a CLIP's.
    """
    check_choice("frame_pooling", frame_pooling, get_args(FramePooling))
    if isinstance(model, CLIP) and frame_pooling != "mean":
        raise ValueError("a CLIP embeds a clip as the mean of its frames: leave it out")


def frame_pooling_of(pooling: Any) -> FramePooling:
    """How a `Pooling` pools clips."""
    found: FramePooling = pooling.options.get("frame_pooling", "tokens")
    return found


def add_frame_positions(model: CoCa, count: int) -> None:
    """The option `frame_positions` of a model: a learned position (C,) for each of so many frames, added to its tokens.

    Raises:
        ValueError: it is no number of frames.
    """
    check_number("frame_positions", count, whole=True, at_least=0)
    model.pooling.add_parameter("frame_positions", count, 1, model.image_encoder.width)


class Clips(Input):
    """A batch of clips, F frames each in the place of an image.

    Attributes:
        rows: (B, F, 3, H, W), of one clip (F, 3, H, W).
    """

    @classmethod
    def stack(cls, images: Sequence[Self]) -> Self:
        if len({clip.rows.shape for clip in images}) > 1:
            raise DataError("clips of several numbers of frames are in one batch: take records of one kind")
        return super().stack(images)

    def mirrored(self) -> Self:
        return replace(self, rows=self.rows.flip(-1))

    def encoded_by(self, encoder: Callable[[Tensor], Any]) -> "EncodedFrames":
        if self.rows.ndim != 5:
            raise ValueError(
                f"clips must have the shape (batch, frames, 3, height, width), got {tuple(self.rows.shape)}"
            )
        return EncodedFrames(encoder(self.rows.flatten(0, 1)).unflatten(0, self.rows.shape[:2]))


class EncodedFrames(Input):
    """A batch of clips after an image encoder, which sees each frame by itself.

    Attributes:
        rows: tokens (B, F, S, C).
    """

    def encoded_by(self, encoder: Callable[[Tensor], Any]) -> Self:
        return self

    def pooled_by(self, pooling: Any, contrastive: bool, captioning: bool) -> tuple[Tensor | None, Tensor | None]:
        """Of the tokens of all frames together, or means of what `Pooling.pool` makes of each frame."""
        frames = self.rows
        positions = getattr(pooling, "frame_positions", None)
        if positions is not None:
            count = frames.shape[1]
            known = len(positions)
            if count != known:
                raise DataError(f"the model has positions for {known} frames, got clips of {count}: set frames={known}")
            frames = frames + positions
        if frame_pooling_of(pooling) == "tokens":
            first = frames[:, 0, : pooling.left_out]
            kept = frames[:, :, pooling.left_out :].flatten(1, 2)
            return pooling.pool(torch.cat([first, kept], dim=1) if pooling.left_out else kept, contrastive, captioning)
        vector, rows = pooling.pool(frames.flatten(0, 1), contrastive, captioning)  # (B · F, E) and (B · F, Q, E)
        return _mean_of_frames(vector, frames), _mean_of_frames(rows, frames)

    def joined(self, pooling: Any = None) -> Tensor:
        """One frame after the other, (B, F · S, C)."""
        if pooling is not None and frame_pooling_of(pooling) == "mean":
            raise ConfigError("here the tokens of all frames are seen at once: set frame_pooling=tokens")
        return self.rows.flatten(1, 2)

    def class_tokens(self) -> Tensor:
        return self.rows[:, :, 0].mean(dim=1)


def _mean_of_frames(pooled: Tensor | None, frames: Tensor) -> Tensor | None:
    if pooled is None:
        return None
    return pooled.unflatten(0, frames.shape[:2]).mean(dim=1)
