"""The built-in scenes in the files of well-known caption data sets, to try their readers.

The formats that users can have are in `coca_lit.tools.prepare.scenes`.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from coca_lit.data.records import Record
from coca_lit.data.scenes.render import WORDINGS, captions, decode, scene_records

LICENSES = [{"id": 0, "name": "synthetic", "url": ""}]


def write_data_set(format: str, folder: Path, count: int, size: int = 32) -> None:
    """Writes a data set of scenes into the new folder.

    Args:
        format: a key of WRITERS.
        count: training images; val and test get an eighth of it each. For nocaps: images of all domains.
        size: height and width of the images in pixels.
    """
    WRITERS[format](folder, count, size)


def write_karpathy(folder: Path, count: int, size: int, name: str = "coco") -> None:
    """Karpathy's splits: dataset_NAME.json and images/. Only coco has sub-folders, COCO ids and a split restval."""
    entries: list[dict[str, Any]] = []
    for split in ("train", "val", "test"):
        for i, record in enumerate(scene_records(split, size, split_count(split, count))):
            entry: dict[str, Any] = {"filename": f"{record.id}.jpg", "split": split}
            if name == "coco":
                own_split = "restval" if split == "train" and i % 4 == 3 else split
                place = "train2014" if own_split == "train" else "val2014"
                entry = {"filepath": place, "filename": f"COCO_{place}_{record.id:012d}.jpg", "cocoid": record.id}
                entry["split"] = own_split
            imgid, texts = len(entries), record.captions
            sentences = [
                {"tokens": text.split(), "raw": text, "imgid": imgid, "sentid": imgid * len(texts) + number}
                for number, text in enumerate(texts)
            ]
            ids = {"imgid": imgid, "sentids": [sentence["sentid"] for sentence in sentences]}
            entries.append({**entry, **ids, "sentences": sentences})
            write_image(folder / "images" / entry.get("filepath", "") / entry["filename"], record.image)
    write_json(folder / f"dataset_{name}.json", {"images": entries, "dataset": name})


def write_coco(folder: Path, count: int, size: int) -> None:
    """COCO captions 2017: annotations/captions_{train,val}2017.json and the image folders train2017/ and val2017/."""
    for split in ("train", "val"):
        records = scene_records(split, size, split_count(split, count))
        images = []
        for record in records:
            images.append({"id": record.id, **_coco_image(f"{record.id:012d}.jpg", size), "flickr_url": ""})
            write_image(folder / f"{split}2017" / images[-1]["file_name"], record.image)
        write_json(folder / "annotations" / f"captions_{split}2017.json", _coco_captions(images, records))


def write_nocaps(folder: Path, count: int, size: int) -> None:
    """Nocaps validation with ten captions an image: nocaps_val_4500_captions.json and images/.

    A third each: scenes as in training (in-domain), unseen colour-shape pairs (near-domain), three objects (out).
    """
    sources = (("in-domain", "val", 2), ("near-domain", "compositional", 2), ("out-domain", "val", 3))
    images: list[dict[str, Any]] = []
    records: list[Record] = []
    for place, (domain, split, objects) in enumerate(sources):
        share = len(range(place, count, len(sources)))
        for record in scene_records(split, size, share, objects):
            texts = captions(decode(int(record.id), objects), WORDINGS)
            records.append(Record(len(records), record.image, texts, domain))
            name = f"{records[-1].id:016x}"
            images.append(
                {"id": records[-1].id, "open_images_id": name, **_coco_image(f"{name}.jpg", size), "domain": domain}
            )
            write_image(folder / "images" / f"{name}.jpg", record.image)
    write_json(folder / "nocaps_val_4500_captions.json", _coco_captions(images, records))


def split_count(split: str, count: int) -> int:
    return count if split == "train" else max(1, count // 8)


def _coco_image(file_name: str, size: int) -> dict[str, Any]:
    date = "2000-01-01 00:00:00"
    return {"file_name": file_name, "height": size, "width": size, "license": 0, "coco_url": "", "date_captured": date}


def _coco_captions(images: list[dict[str, Any]], records: Sequence[Record]) -> dict[str, Any]:
    pairs = ((record.id, text) for record in records for text in record.captions)
    annotations = [{"image_id": image, "id": i, "caption": text} for i, (image, text) in enumerate(pairs)]
    info = {"description": "synthetic scenes", "version": "1.0", "year": 2000, "url": "", "contributor": ""}
    return {"info": {**info, "date_created": ""}, "licenses": LICENSES, "images": images, "annotations": annotations}


def write_image(path: Path, image: Callable[[], Image.Image]) -> None:
    """JPEG with full chroma resolution (4:4:4): halving it would blur the colours of objects a few pixels wide."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image().save(path, quality=95, subsampling=0)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


WRITERS: dict[str, Callable[[Path, int, int], None]] = {
    "karpathy": write_karpathy,
    "flickr8k": partial(write_karpathy, name="flickr8k"),
    "coco": write_coco,
    "nocaps": write_nocaps,
}
