"""Statements about built-in scenes in the files of SNLI-VE, NLVR2 and your own pairs, to try their readers offline."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from coca_lit.data.scenes.render import DEFAULT_COUNTS
from coca_lit.projects.reasoning.scene_statements import comparison_records, entailment_records
from coca_lit.tools.prepare.scenes import jpeg

PHOTO_DIGITS = {"train": 1, "val": 2, "test": 3}  # that begin the names of photos, by the split


def write_snli_ve(folder: Path, count: int, size: int) -> None:
    """SNLI-VE: snli_ve_{train,dev,test}.jsonl and flickr30k_images/."""
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test")):
        rows: list[dict[str, Any]] = []
        photos: dict[Any, str] = {}  # name of each image
        for record in entailment_records(split, size, _split_count(split, count)):
            photo = photos.setdefault(record.image, f"{PHOTO_DIGITS[split]}{len(photos):07d}")
            path = folder / "flickr30k_images" / f"{photo}.jpg"
            if not path.exists():
                _write_image(path, record.image)
            rows.append(
                {
                    "annotator_labels": [record.captions[0]],
                    "captionID": f"{photo}.jpg#0",
                    "gold_label": record.captions[0],
                    "pairID": f"{photo}.jpg#0r{len(rows)}",
                    "sentence1": "",
                    "sentence2": record.question,
                    "Flickr30K_ID": photo,
                }
            )
        _write_lines(folder / f"snli_ve_{name}.jsonl", rows)


def write_nlvr2(folder: Path, count: int, size: int) -> None:
    """NLVR2: data/{train,dev,test1}.json, a JSON object a line, and images/train/NUMBER/, dev/ and test1/."""
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test1")):
        rows: list[dict[str, Any]] = []
        numbers: dict[Any, int] = {}  # of each pair of images
        for record in comparison_records(split, size, _split_count(split, count)):
            is_new = record.images not in numbers
            number = numbers.setdefault(record.images, len(numbers))
            pair = f"{name}-{number // 2}-{number % 2}"
            directory = number % 3
            place = folder / "images" / "train" / str(directory) if split == "train" else folder / name
            if is_new:
                for i, image in enumerate(record.images):
                    _write_image(place / f"{pair}-img{i}.png", image)
            row: dict[str, Any] = {
                "identifier": f"{pair}-{len(rows) % 2}",
                "sentence": record.question,
                "left_url": f"scenes:{pair}",
                "right_url": f"scenes:{pair}",
                "label": record.captions[0].capitalize(),
                "synset": "scene",
                "query": "",
            }
            if split == "train":
                row["directory"] = directory
            rows.append(row)
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
    (folder / "pairs.csv").write_text("\n".join(rows))


def _split_count(split: str, count: int) -> int:
    return count if split == "train" else min(DEFAULT_COUNTS[split], max(1, count // 8))


def _write_image(path: Path, image: Callable[[], Image.Image]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        image().save(path)
    else:
        path.write_bytes(jpeg(image))


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
