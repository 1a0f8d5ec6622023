"""Writes the built-in scenes in the file formats of well-known data sets, to try their readers offline.

    python -m coca_lit.tools.prepare.scenes shards OUT --count 2000 --size 64

The folders have the layout and the JSON schemas of the originals: image-text shards as img2dataset writes them,
SNLI-VE, NLVR2, and your own pairs.
"""

import argparse
import hashlib
import io
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from coca_lit.data.scenes.render import DEFAULT_COUNTS, scene_records
from coca_lit.data.scenes.statements import comparison_records, entailment_records
from coca_lit.data.shards.tar import tar_writer

SPLIT_DIGITS = {"train": 1, "val": 2, "test": 3}  # that begin the names of photos


def export_scenes(format: str, out: Path, count: int = 1500, size: int = 32) -> None:
    """Writes a data set of scenes into the new or empty folder `out`, which appears only when it is complete.

    Args:
        format: a key of WRITERS.
        count: training images; val and test get an eighth of it each, at most 512.
        size: height and width of the images in pixels.

    Raises:
        ValueError: unknown format, or more images than there are scenes.
        FileExistsError: `out` is a file or holds something.
    """
    if format not in WRITERS:
        raise ValueError(f"unknown format {format!r}; known: {', '.join(WRITERS)}")
    if count < 1 or size < 1:
        raise ValueError(f"count and size must be at least 1, got count={count} and size={size}")
    out = out.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} is not an empty folder; give a new one, or remove what is there first")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / "partial"  # one level down, since the temporary folder itself is private to the user
        folder.mkdir()
        WRITERS[format](folder, count, size)
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
                image = _jpeg(record.image)
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


def write_snli_ve(folder: Path, count: int, size: int) -> None:
    """SNLI-VE: snli_ve_{train,dev,test}.jsonl and flickr30k_images/."""
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test")):
        rows: list[dict[str, Any]] = []
        photos: dict[Any, str] = {}
        for record in entailment_records(split, size, _split_count(split, count)):
            photo = photos.setdefault(record.image, f"{SPLIT_DIGITS[split]}{len(photos):07d}")
            path = folder / "flickr30k_images" / f"{photo}.jpg"
            if not path.exists():
                _write_image(path, record.image)
            about = {
                "annotator_labels": [record.captions[0]],
                "captionID": f"{photo}.jpg#0",
                "gold_label": record.captions[0],
            }
            row = {"pairID": f"{photo}.jpg#0r{len(rows)}", "sentence1": "", "sentence2": record.question}
            rows.append({**about, **row, "Flickr30K_ID": photo})
        _write_lines(folder / f"snli_ve_{name}.jsonl", rows)


def write_nlvr2(folder: Path, count: int, size: int) -> None:
    """NLVR2: data/{train,dev,test1}.json, a JSON object a line, and images/train/NUMBER/, dev/ and test1/."""
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test1")):
        rows: list[dict[str, Any]] = []
        pairs: dict[Any, tuple[str, int]] = {}  # by its images, a pair and its directory
        for record in comparison_records(split, size, _split_count(split, count)):
            number = len(pairs)
            pair, directory = pairs.setdefault(record.images, (f"{name}-{number // 2}-{number % 2}", number % 3))
            place = folder / (f"images/train/{directory}" if split == "train" else name)
            if len(pairs) > number:
                for i, image in enumerate(record.images):
                    _write_image(place / f"{pair}-img{i}.png", image)
            urls = {f"{side}_url": f"scenes:{pair}" for side in ("left", "right")}
            about = {"identifier": f"{pair}-{len(rows) % 2}", "sentence": record.question, **urls}
            inside = {"directory": directory} if split == "train" else {}
            rows.append({**about, "label": record.captions[0].capitalize(), "synset": "scene", "query": "", **inside})
        _write_lines(folder / "data" / f"{name}.json", rows)


def write_pairs(folder: Path, count: int, size: int) -> None:
    """Your own texts about two photos: pairs.csv and images/."""
    rows = ["image,image2,text,label,split,kind"]
    for split in ("train", "val"):
        for record in comparison_records(split, size, _split_count(split, count)):
            names = [f"{split}_{len(rows)}_{i}.png" for i in (0, 1)]
            for name, image in zip(names, record.images, strict=True):
                _write_image(folder / "images" / name, image)
            rows.append(",".join([*names, record.question, record.captions[0], split, str(record.domain)]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.csv").write_text("\n".join(rows))


def _split_count(split: str, count: int) -> int:
    return count if split == "train" else min(DEFAULT_COUNTS[split], max(1, count // 8))


def _jpeg(image: Callable[[], Image.Image]) -> bytes:
    """JPEG with full chroma resolution (4:4:4): halving it would blur the colours of objects a few pixels wide."""
    buffer = io.BytesIO()
    image().save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _write_image(path: Path, image: Callable[[], Image.Image]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        image().save(path)
    else:
        path.write_bytes(_jpeg(image))


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


WRITERS: dict[str, Callable[[Path, int, int], None]] = {
    "shards": write_shards,
    "snli_ve": write_snli_ve,
    "nlvr2": write_nlvr2,
    "pairs": write_pairs,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m coca_lit.tools.prepare.scenes",
        description="Write the built-in scenes in the files of a well-known data set.",
    )
    parser.add_argument("format", choices=list(WRITERS))
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
