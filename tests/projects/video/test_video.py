"""Frames of clips: those of a plain loop over everything that is decoded; and what strangers may send."""

import random
import struct
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

import av

from coca_lit.errors import DataError
from coca_lit.projects.video import decoding
from coca_lit.projects.video.clips import ClipFile, EncodedClip
from helpers.clips import greys, write_clip
from helpers.fuzzing import bounded


def plain(path: Path, count: int) -> list[np.ndarray]:
    """The last frame that began before the middle of each part, of all frames."""
    with av.open(path) as container:
        frames = [
            (float(frame.pts * frame.time_base), frame.to_ndarray(format="rgb24"))
            for frame in container.decode(video=0)
        ]
    first, last = frames[0][0], frames[-1][0]
    span = last - first + (last - first) / max(len(frames) - 1, 1)
    found = []
    for i in range(count):
        middle, shown = first + span * (i + 0.5) / count, frames[0][1]
        for begin, pixels in frames:
            if begin <= middle:
                shown = pixels
        found.append(shown)
    return found


def read(path: Path, count: int) -> list[np.ndarray]:
    return [np.asarray(frame) for frame in ClipFile(path, count).frames()]


KINDS = [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4")]


@pytest.mark.parametrize("count", [1, 3, 8, 40])
@pytest.mark.parametrize(("name", "codec"), KINDS)
def test_frames_are_uniform_in_time(tmp_path: Path, name: str, codec: str, count: int) -> None:
    path = write_clip(tmp_path / name, greys(range(0, 250, 10)), codec)
    found = read(path, count)
    assert len(found) == count
    np.testing.assert_array_equal(found, plain(path, count))


def test_frames_of_uneven_length(tmp_path: Path) -> None:
    """Time counts, not the number of frames: most of this clip is its second frame."""
    path = write_clip(tmp_path / "a.mkv", greys([0, 50, 100, 150, 200]), times=[0, 1, 20, 21, 22])
    found = [int(pixels.mean()) for pixels in read(path, 8)]
    np.testing.assert_array_equal(read(path, 8), plain(path, 8))
    assert np.allclose(found[:6], 50, atol=3)


def test_a_long_clip_is_decoded_from_keyframes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "a.mp4", greys([i % 250 for i in range(400)]), keyframes=10)
    np.testing.assert_array_equal(read(path, 5), plain(path, 5))
    calls = []
    monkeypatch.setattr(decoding, "_in_time", lambda *_: calls.append(1))
    read(path, 5)
    assert len(calls) < 400 + 5 * 16  # all packets, and at most a group of frames for each


def test_the_middle_frame_is_the_image(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", greys(range(0, 250, 10)))
    np.testing.assert_array_equal(np.asarray(ClipFile(path, 8)()), plain(path, 1)[0])
    np.testing.assert_array_equal(np.asarray(EncodedClip(path.read_bytes(), "a", 8)()), plain(path, 1)[0])


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
        ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
        ((0, -1, 1, 0), lambda x: np.rot90(x)),
        ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
        ((1, 0, 0, -1), lambda x: x[::-1]),
    ],
)
def test_the_display_matrix_is_applied(tmp_path: Path, matrix: tuple[int, ...], turned) -> None:
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :16] = 255
    path = write_clip(tmp_path / "a.mp4", [pixels] * 3)
    upright = read(path, 1)[0]
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # version 0
    a, b, c, d = (value << 16 for value in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    np.testing.assert_array_equal(read(path, 1)[0], turned(upright))


def test_clips_of_strangers(tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "a.mp4", greys(range(0, 250, 10))).read_bytes()
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"
    sound = write_clip(tmp_path / "sound.mp4", []).read_bytes()
    absurd = bytearray(whole)
    for box in (b"mvhd", b"mdhd"):  # a length of 2 ** 32 - 1 units, which no one believes
        at = whole.index(box) + 4 + 16
        absurd[at : at + 4] = b"\xff" * 4
    for content, reason in [
        (b"", "none of MP4"),
        (b"\0\0\0\x18ftypisom", "clip"),
        (whole[: len(whole) // 2], "clip"),
        (playlist, "none of MP4"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "none of MP4"),
        (sound, "no video"),
    ]:
        with pytest.raises(DataError, match=reason) as error:
            [*EncodedClip(content, "b.mp4", 4).frames()]
        assert str(error.value).startswith("b.mp4 ")
        assert "\n" not in str(error.value)
    assert len([*EncodedClip(bytes(absurd), "b.mp4", 4).frames()]) == 4
    with pytest.raises(DataError, match="not a readable clip"):
        ClipFile(tmp_path, 4)()
    (tmp_path / "a.mp4").write_bytes(whole)
    with pytest.raises(DataError, match="1 to 256"):
        [*ClipFile(tmp_path / "a.mp4", 1000).frames()]


def test_no_frames(tmp_path: Path) -> None:
    content = bytearray(write_clip(tmp_path / "a.mkv", greys([1, 2])).read_bytes())
    cluster = content.index(b"\x1f\x43\xb6\x75")
    with pytest.raises(DataError, match="not a readable clip"):
        [*EncodedClip(bytes(content[:cluster]), "a", 2).frames()]


def test_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "a.mp4", greys(range(0, 250, 10)))
    for name, value, reason in [
        ("MAX_BYTES", 100, "bytes, more than"),
        ("MAX_SECONDS", 1, "longer than"),
        ("MAX_PACKETS", 10, "more than 10 frames"),
        ("MAX_PIXELS", 1000, "64 x 48 pixels"),
        ("MAX_WORK", 0.0, "more than 0 seconds"),
    ]:
        with monkeypatch.context() as changed:
            changed.setattr(decoding, name, value)
            with pytest.raises(DataError, match=reason):
                read(path, 4)


def test_huge_frames(tmp_path: Path) -> None:
    """A file of kilobytes can hold frames of gigabytes, also where its header claims others."""
    content = write_clip(tmp_path / "a.avi", greys([0], 4096, 4096), "mpeg4").read_bytes()
    for claimed in (4096, 64):
        forged = content.replace(struct.pack("<I", 4096), struct.pack("<I", claimed))
        with bounded(), pytest.raises(DataError, match="4096 x 4096 pixels"):
            [*EncodedClip(forged, "a", 4).frames()]


@pytest.mark.parametrize(("name", "codec"), KINDS)
def test_damaged_bytes_are_an_error_or_a_clip(tmp_path: Path, name: str, codec: str) -> None:
    content = write_clip(tmp_path / name, greys(range(0, 250, 10)), codec).read_bytes()
    for seed in range(30):
        rng, damaged = random.Random(seed), bytearray(content)
        for _ in range(rng.choice((1, 5, 50))):
            damaged[rng.randrange(12, len(damaged) if seed % 2 else 400)] = rng.randrange(256)
        began = time.monotonic()
        with suppress(DataError):
            assert len([*EncodedClip(bytes(damaged), name, 4).frames()]) == 4
        assert time.monotonic() - began < 5
