"""From a clip, which may come from a stranger, to frames: the only place that decodes video, and loaded only for it.

PyAV's wheels bring FFmpeg, while torchcodec's need one on the machine and a certain PyTorch. FFmpeg sees neither
playlists nor network: the first bytes choose one of three containers, and a few decoders are allowed.

Nothing that a header claims is believed. All packets are read first, undecoded, which bounds their number and tells the
time of every frame; then frames are decoded from the keyframes before the wanted ones.
"""

import struct
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from coca_lit.data.pixels import check_shape, upright
from coca_lit.errors import DataError

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer

MAX_BYTES = 2**30  # of a clip
MAX_SECONDS = 4 * 3600  # of a clip
MAX_PACKETS = 1_000_000  # of its video: four hours at 60 frames a second are 864,000
MAX_PIXELS = 4096 * 2304  # of a frame
MAX_FRAMES = 256  # that are taken from a clip
MAX_WORK = 60.0  # seconds of reading and decoding
DECODERS = "h264,hevc,mpeg4,mpeg2video,mjpeg,vp8,vp9,libvpx,libvpx-vp9,av1,libdav1d"
_OPTIONS = {
    "protocol_whitelist": "",  # a clip names no other files
    "codec_whitelist": DECODERS,
    "max_pixels": str(MAX_PIXELS),
    "max_streams": "32",
    "probesize": str(8 * 2**20),
    "threads": "1",  # clips are decoded side by side
}
# (a, b, c, d) of a display matrix, x' = a x + c y and y' = b x + d y -> orientation as in EXIF, see `upright`
_ORIENTATIONS = {
    **{(1, 0, 0, 1): 1, (-1, 0, 0, 1): 2, (-1, 0, 0, -1): 3, (1, 0, 0, -1): 4},
    **{(0, 1, 1, 0): 5, (0, 1, -1, 0): 6, (0, -1, -1, 0): 7, (0, -1, 1, 0): 8},
}


def read_frames(file: IO[bytes], name: str | Path, count: int) -> Iterator[Image.Image]:
    """The frames that are seen in the middle of `count` equal parts of the time, upright; some of them several times
    where the clip has fewer.

    Raises:
        DataError: it is anything but a clip of sensible size and length, or PyAV is missing; names `name`.
    """
    if not 1 <= count <= MAX_FRAMES:
        raise DataError(f"frames of a clip must be 1 to {MAX_FRAMES}, got {count}")
    until = time.monotonic() + MAX_WORK
    with _opened(file, name) as (container, stream):
        wanted, keys = _plan(container, stream, name, count, until)
        decoded: Iterator[VideoFrame] = iter(())
        frame: VideoFrame | None = None
        shown = 0  # its time
        for at in wanted:
            key = keys[max(bisect_right(keys, at) - 1, 0)]
            if frame is None or shown < key:
                container.seek(key, stream=stream)
                decoded, frame = container.decode(stream), None
            while frame is None or shown < at:
                _in_time(until, name)
                frame = next(decoded, None)
                if frame is None or frame.pts is None:
                    raise DataError(f"{name} is not a readable clip: it is incomplete, or frames have no time")
                shown = frame.pts
            yield _image(frame, name)


@contextmanager
def _opened(file: IO[bytes], name: str | Path) -> "Iterator[tuple[InputContainer, VideoStream]]":
    """The container and its first video; the errors of FFmpeg in the block are `DataError`s."""
    try:
        import av
    except ImportError as error:
        raise DataError(f"{name} is a clip and needs an optional package: pip install 'coca_lit[video]'") from error
    size, head = file.seek(0, 2), (file.seek(0), file.read(12))[1]
    if size > MAX_BYTES:
        raise DataError(f"{name} has {size:,} bytes, more than the {MAX_BYTES:,} of a clip that are read")
    container = "matroska" if head.startswith(b"\x1aE\xdf\xa3") else "avi" if head[8:] == b"AVI " else "mov"
    if container == "mov" and head[4:8] not in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        raise DataError(f"{name} is not a readable clip: it is none of MP4, MOV, WebM, MKV, AVI")
    file.seek(0)
    try:
        opening: Any = dict(format=container, options=_OPTIONS, timeout=MAX_WORK)
        if int(av.__version__.partition(".")[0]) < 19:  # which would break off at texts that are not UTF-8
            opening["metadata_errors"] = "replace"
        with av.open(file, "r", **opening) as opened:
            if not opened.streams.video or (stream := opened.streams.video[0]).codec_context is None:
                raise DataError(f"{name} is not a readable clip: it has no video that can be decoded")
            check_shape(max(stream.width, 1), max(stream.height, 1), name, MAX_PIXELS)
            yield opened, stream
    except DataError:
        raise
    except Exception as error:  # PyAV raises many types on broken bytes
        raise DataError(f"{name} is not a readable clip: {getattr(error, 'strerror', None) or error}") from error


def _plan(
    container: "InputContainer", stream: "VideoStream", name: str | Path, count: int, until: float
) -> tuple[list[int], list[int]]:
    """The times of the frames that are seen in the middle of equal parts of the clip, and of all keyframes, in units of
    the stream.
    """
    times: list[int] = []
    keys: list[int] = []
    for packet in container.demux(stream):
        at = packet.dts if packet.pts is None else packet.pts
        if at is None or not packet.size:
            continue
        _in_time(until, name)
        if len(times) == MAX_PACKETS:
            raise DataError(f"{name} has more than {MAX_PACKETS:,} frames, which are not read")
        if not packet.is_discard:  # an edit list leaves it out
            times.append(at)
        if packet.is_keyframe:
            keys.append(at)
    if not times or not keys:
        raise DataError(f"{name} is not a readable clip: it has no frames")
    times.sort()
    keys.sort()
    first, last = times[0], times[-1]
    mean = (last - first) / max(len(times) - 1, 1)
    span = last - first + mean  # the last frame is seen as long as the others
    if stream.time_base is None or span * stream.time_base > MAX_SECONDS:
        raise DataError(f"{name} is longer than {MAX_SECONDS // 3600} hours: cut it")
    middles = (first + (i + 0.5) * span / count for i in range(count))
    return [times[bisect_right(times, middle) - 1] for middle in middles], keys


def _image(frame: "VideoFrame", name: str | Path) -> Image.Image:
    if frame.is_corrupt:
        raise DataError(f"{name} is not a readable clip: a frame is damaged")
    check_shape(frame.width, frame.height, name, MAX_PIXELS)  # it may change within a clip
    pixels = np.asarray(frame.to_image())
    parts: Any = frame.side_data
    matrix = bytes(parts.get("DISPLAYMATRIX", b""))
    if len(matrix) == 36:
        a, b, _, c, d, *_ = struct.unpack("9i", matrix)
        signs = tuple((value > 0) - (value < 0) for value in (a, b, c, d))
        pixels = upright(pixels, _ORIENTATIONS.get(signs, 1))
    return Image.fromarray(pixels)


def _in_time(until: float, name: str | Path) -> None:
    if time.monotonic() > until:
        raise DataError(f"{name} takes more than {MAX_WORK:.0f} seconds to decode: cut it, or make it smaller")
