"""Clips that tests write, each frame of one grey."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_clip(
    path: Path,
    frames: list[np.ndarray],
    codec: str = "libx264",
    keyframes: int = 12,
    times: list[int] | None = None,
) -> Path:
    """frames: (H, W, 3) uint8; none: sound alone. times: of each, in tenths of a second."""
    with av.open(path, "w") as container:
        if frames:
            stream = container.add_stream(codec, rate=10, options={"g": str(keyframes)})
            stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        else:
            stream = container.add_stream("aac", rate=48000)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = i if times is None else times[i]
            frame.time_base = Fraction(1, 10)
            container.mux(stream.encode(frame))
        if not frames:
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 48000
            container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return path


def greys(values: range | list[int], height: int = 48, width: int = 64) -> list[np.ndarray]:
    return [np.full((height, width, 3), value, np.uint8) for value in values]
