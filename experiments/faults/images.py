"""What the costliest images take that are decoded at all: images of each kind at the bounds of `coca_lit.data.pixels`.

    python experiments/faults/images.py

images.csv has a row for each: seconds of one core, and by how much the memory of a process grows.
"""

import os
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from coca_lit.data.pixels import (  # noqa: E402
    MAX_IMAGE,
    MAX_PIXELS,
    MAX_PROGRESSIVE,
    MAX_SCANNED,
    MAX_SCANS,
    MAX_SLOW_PIXELS,
    decode_pixels,
)
from coca_lit.errors import DataError  # noqa: E402
from coca_lit.runs.run_folder import environment  # noqa: E402
from experiments.faults.soak import write_csv  # noqa: E402

ImageFile.MAXBLOCK = 2**26  # bytes that a progressive JPEG is written in, all at once
SIDE, LARGE = int(MAX_SLOW_PIXELS**0.5), int(MAX_PIXELS**0.5)


def noise(side: int, colours: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, colours), dtype=np.uint8)


def encoded(
    pixels: np.ndarray | Image.Image, kind: str, most: int = MAX_IMAGE, mode: str | None = None, **options: Any
) -> bytes:
    """In the best quality of which a file has at most this many bytes."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels.squeeze(), mode)
    for quality in (95, 80, 60, 50, 40, 30, 20, 10):
        buffer = BytesIO()
        with suppress(ValueError):  # too much for a WebP
            image.save(buffer, kind, **{"quality": quality} | options)
        if 0 < buffer.tell() <= most:
            return buffer.getvalue()
    raise ValueError(f"no quality is low enough for {most} bytes")


def with_scans(jpeg: bytes, side: int) -> bytes:
    """A JPEG whose first scan, without its data, comes again as often as is allowed."""
    count = min(MAX_SCANS, MAX_SCANNED // side**2) - jpeg.count(b"\xff\xda")
    start = jpeg.index(b"\xff\xda")
    end = start + 2 + int.from_bytes(jpeg[start + 2 : start + 4])
    return jpeg[:-2] + jpeg[start:end] * count + jpeg[-2:]


def png(bits: int, interlaced: bool) -> bytes:
    """All zeros, predicted by Paeth's filter; compresses a thousand times."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    packer, parts = zlib.compressobj(1), []
    for x, y, dx, dy in passes if interlaced else [(0, 0, 1, 1)]:
        row = b"\x04" + bytes(-((x - SIDE) // dx) * bits // 2)
        parts += [packer.compress(row) for _ in range(-((y - SIDE) // dy))]
    header = struct.pack(">IIBBBBB", SIDE, SIDE, bits, 6, 0, 0, interlaced)
    data = chunk(b"IDAT", b"".join(parts) + packer.flush())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def with_texts() -> bytes:
    texts = PngImagePlugin.PngInfo()
    for i in range(60):
        texts.add_text(f"a{i}", "x" * 2**20, zip=True)
    return encoded(Image.new("RGB", (64, 64)), "PNG", pnginfo=texts)


def images() -> Iterator[tuple[str, bytes]]:
    slope = np.linspace(0, 255, SIDE).astype(np.uint8)
    slopes = np.stack(np.broadcast_arrays(slope, slope[:, None], slope ^ 0x55), axis=2)
    yield "baseline JPEG, 40 million pixels of noise", encoded(noise(LARGE, 3), "JPEG", subsampling=0)
    restarts = encoded(noise(LARGE, 3), "JPEG", subsampling=0, restart_marker_blocks=1)
    yield "baseline JPEG, a restart after each block", restarts
    yield "baseline JPEG, empty scans", with_scans(encoded(noise(LARGE, 3), "JPEG", subsampling=0), LARGE)
    for side in (SIDE, SIDE // 2, SIDE // 4):
        progressive = encoded(noise(side, 3), "JPEG", MAX_PROGRESSIVE - 10_000, subsampling=0, progressive=True)
        if side == SIDE:
            yield "progressive JPEG of noise", progressive
        yield f"the same, {side} pixels wide, empty scans", with_scans(progressive, side)
    yield "CMYK JPEG of noise", encoded(noise(SIDE, 4), "JPEG", mode="CMYK")
    yield "progressive CMYK JPEG of noise", encoded(noise(SIDE, 4), "JPEG", MAX_PROGRESSIVE, "CMYK", progressive=True)
    yield "PNG, 16 bits and opacity, all zeros", png(16, interlaced=False)
    yield "PNG, interlaced, all zeros", png(8, interlaced=True)
    yield "PNG with 60 texts of a megabyte each, compressed", with_texts()
    yield "GIF of noise", encoded(noise(SIDE, 1), "GIF")
    yield "WebP, lossless slopes", encoded(slopes, "WEBP", lossless=True, method=0)
    yield "WebP of noise", encoded(noise(SIDE, 3), "WEBP", method=0)
    yield "BMP", encoded(noise(3300, 3), "BMP")


def cost(content: bytes) -> tuple[float, float, str]:
    """Seconds and megabytes of decoding, in a process of its own; and what came of it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins here
    before, began = peak(), time.process_time()
    try:
        outcome = " x ".join(map(str, decode_pixels(content, "it").shape[:2]))
    except DataError as refused:
        outcome = str(refused)
    seconds = time.process_time() - began
    return seconds, peak() - before, outcome


def peak() -> float:
    """Megabytes that this process has had at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    found = environment()
    about = {key: found[key] for key in ("commit", "machine")} | {"command": "python experiments/faults/images.py"}
    rows = []
    for name, content in images():
        with get_context("spawn").Pool(1) as pool:
            seconds, megabytes, outcome = pool.apply(cost, [content])
        row = {
            "image": name,
            "MB": f"{len(content) / 1e6:.1f}",
            "seconds": f"{seconds:.2f}",
            "memory MB": f"{megabytes:.0f}",
        }
        rows.append(row | {"outcome": outcome} | about)
        print(*row.values(), outcome, sep="  ", flush=True)
    write_csv(HERE / "images.csv", rows)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
