"""Writes the built-in scenes in the file formats of well-known data sets, to try their readers offline.

    python -m coca_lit.tools.prepare.scenes shards OUT --count 2000 --size 64

The folders have the layout and the JSON schemas of the originals: image-text shards as img2dataset writes them, and
what projects declare.
"""

import argparse
import hashlib
import io
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from coca_lit import extensions
from coca_lit.data.scenes.render import scene_records
from coca_lit.data.shards.tar import tar_writer

SHARDS = "shards"


def formats() -> list[str]:
    """The data sets whose files can be written."""
    return [SHARDS, *extensions.declared("scene_files")]


def export_scenes(format: str, out: Path, count: int = 1500, size: int = 32) -> None:
    """Writes a data set of scenes into the new or empty folder `out`, which appears only when it is complete.

    Args:
        format: one of `formats`.
        count: training images; val and test get an eighth of it each, at most 512.
        size: height and width of the images in pixels.

    Raises:
        ValueError: unknown format, or more images than there are scenes.
        FileExistsError: `out` is a file or holds something.
    """
    if format not in formats():
        raise ValueError(f"unknown format {format!r}; known: {', '.join(formats())}")
    if count < 1 or size < 1:
        raise ValueError(f"count and size must be at least 1, got count={count} and size={size}")
    out = out.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} is not an empty folder; give a new one, or remove what is there first")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / "partial"  # one level down, since the temporary folder itself is private to the user
        folder.mkdir()
        write = write_shards if format == SHARDS else extensions.load(extensions.declared("scene_files")[format])
        write(folder, count, size)
        folder.replace(out)


def write_shards(folder: Path, count: int, size: int, per_shard: int = 250) -> None:
    """Train scenes as img2dataset shards: 00000.tar with KEY.jpg, KEY.txt, KEY.json, beside it 00000_stats.json, ...

    KEY is shard * 10^ceil(log10(per_shard)) + row with leading zeros. Each image has one
    caption, in alternating wording.
    """
    digits = math.ceil(math.log10(per_shard))
    records = scene_records("train", size, count)
    sizes = {"width": size, "height": size, "original_width": size, "original_height": size}
    for shard, start in enumerate(range(0, count, per_shard)):
        rows = records[start : start + per_shard]
        started = time.time()
        with tar_writer(folder / f"{shard:05d}.tar") as tar:
            for row, record in enumerate(rows):
                key = f"{shard * 10**digits + row:0{5 + digits}d}"
                caption = record.captions[row % len(record.captions)]
                image = jpeg(record.image)
                url = f"scenes:{record.id}"
                about: dict[str, Any] = {"url": url, "caption": caption, "key": key, "status": "success"}
                about |= {"error_message": None, **sizes, "exif": "{}", "sha256": hashlib.sha256(image).hexdigest()}
                meta = json.dumps(about, indent=4).encode()
                tar.write({"__key__": key, "jpg": image, "txt": caption.encode(), "json": meta})
        ended = time.time()
        stats = {"count": len(rows), "successes": len(rows), "failed_to_download": 0, "failed_to_resize": 0}
        times = {"duration": ended - started, "start_time": started, "end_time": ended}
        content = json.dumps({**stats, **times, "status_dict": {"success": len(rows)}})
        (folder / f"{shard:05d}_stats.json").write_text(content)


def jpeg(image: Callable[[], Image.Image]) -> bytes:
    """JPEG with full chroma resolution (4:4:4): halving it would blur the colours of objects a few pixels wide."""
    buffer = io.BytesIO()
    image().save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m coca_lit.tools.prepare.scenes",
        description="Write the built-in scenes in the files of a well-known data set.",
    )
    parser.add_argument("format", choices=formats())
    parser.add_argument("out", type=Path, help="new or empty folder")
    parser.add_argument("--count", type=int, default=1500, help="training images (%(default)s)")
    parser.add_argument("--size", type=int, default=32, help="pixels of height and width (%(default)s)")
    args = parser.parse_args()
    try:
        export_scenes(args.format, args.out, args.count, args.size)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    print(f"wrote {args.format} data to {args.out}")


if __name__ == "__main__":
    main()
