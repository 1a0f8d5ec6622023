"""Clips as a kind of input: a batch of them, and what an image encoder makes of it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from coca_lit.errors import ConfigError, DataError
from coca_lit.models.inputs import Input


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
        if pooling.frame_positions is not None:
            count, known = frames.shape[1], len(pooling.frame_positions)
            if count != known:
                raise DataError(f"the model has positions for {known} frames, got clips of {count}: set frames={known}")
            frames = frames + pooling.frame_positions
        if pooling.frame_pooling == "tokens":
            first = frames[:, 0, : pooling.left_out]
            kept = frames[:, :, pooling.left_out :].flatten(1, 2)
            return pooling.pool(torch.cat([first, kept], dim=1) if pooling.left_out else kept, contrastive, captioning)
        vector, rows = pooling.pool(frames.flatten(0, 1), contrastive, captioning)  # (B · F, E) and (B · F, Q, E)
        return _mean_of_frames(vector, frames), _mean_of_frames(rows, frames)

    def joined(self, pooling: Any = None) -> Tensor:
        """One frame after the other, (B, F · S, C)."""
        if pooling is not None and pooling.frame_pooling == "mean":
            raise ConfigError("here the tokens of all frames are seen at once: set frame_pooling=tokens")
        return self.rows.flatten(1, 2)

    def class_tokens(self) -> Tensor:
        return self.rows[:, :, 0].mean(dim=1)


def _mean_of_frames(pooled: Tensor | None, frames: Tensor) -> Tensor | None:
    if pooled is None:
        return None
    return pooled.unflatten(0, frames.shape[:2]).mean(dim=1)
