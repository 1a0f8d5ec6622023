"""What only retrieval is scored on, in the published files: images with captions of several sentences (Urban1k, DOCCI,
ShareGPT4V), and which captions of MS-COCO describe which of its images (CrissCrossed Captions, ECCV Caption).

Long captions exceed the context of most models; `RetrievalScores` reports what a model does not read. The pairs of
MS-COCO, among them captions that were written for other images, are for `PositiveRetrieval`.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from coca_lit.data.datasets.annotations import MAX_BYTES, find_file, listing, open_table, read_json_lines, schema
from coca_lit.data.datasets.captions import mscoco_caption_ids
from coca_lit.data.pixels import SUFFIXES
from coca_lit.data.records import Listing, Record, not_found, records_on_disk
from coca_lit.errors import DataError
from coca_lit.reading import is_int64, open_regular, parse_json, read_json

MAX_CAPTION = 2**20  # bytes
MAX_START = 64 * 2**20  # bytes of a list that are read to find its first entries
POSITIVE = 3.0  # of CxC's grades from 0 to 5, the least of a pair that fits (Parekh et al. 2021, arXiv 2004.15020)


def urban1k_records(root: str | Path) -> list[Record]:
    """Urban1k (Zhang et al. 2024, arXiv 2403.15378), and any folder in its layout: image/NAME.jpg, or images/, with a
    caption in caption/NAME.txt.
    """
    root, how = Path(root), "unpack Urban1k.zip, with caption/ and image/, there"
    files = sorted((root / "caption").glob("*.txt"))
    if not files:
        raise not_found("captions of images", [root / "caption"], how)
    folders = [root / "image", root / "images"]
    present = {
        path.stem: path.name for folder in folders for path in folder.glob("*") if path.suffix.lower() in SUFFIXES
    }
    listings = []
    for path in files:
        try:
            with open_regular(path) as file:
                caption = file.readline(MAX_CAPTION).decode(errors="replace").strip()  # the first line, as in Long-CLIP
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        listings.append(Listing(path.stem, present.get(path.stem, f"{path.stem}.jpg"), (caption,)))
    return records_on_disk(listings, folders, root / "caption", how)


def docci_records(root: str | Path, split: str = "test") -> list[Record]:
    """DOCCI (Onoe et al. 2024, arXiv 2404.19753): docci_descriptions.jsonlines and images/.

    Args:
        split: train, test, qual_dev or qual_test.
    """
    how = "put docci_descriptions.jsonlines and images/ there"
    path = find_file("the descriptions of DOCCI", [Path(root) / "docci_descriptions.jsonlines"], how)
    with schema(path, "DOCCI's"):
        cases = [case for case in read_json_lines(path) if case["split"] == split]
        listings = [listing(case["example_id"], case["image_file"], (case["description"],)) for case in cases]
    if not listings:
        raise DataError(f"{path} has no split {split!r}")
    return records_on_disk(listings, [path.parent / "images"], path, how)


def sharegpt4v_records(
    root: str | Path, annotations: str = "share-captioner_coco_lcs_sam_1246k_1107.json", count: int = 1000
) -> list[Record]:
    """The first entries of ShareGPT4V (Chen et al. 2023, arXiv 2311.12793), which Long-CLIP left out of training.

    Args:
        root: folder with the list, [{"image": "sam/images/NAME.jpg", "conversations": [question, {"value": caption}]}],
            and the images in the folders that it names.
        count: entries that are read.
    """
    root, how = Path(root), "put the list of ShareGPT4V and the folders of images that it names there"
    path = find_file("the captions of ShareGPT4V", [root / annotations], how)
    listings: list[Listing] = []
    folders: dict[Path, None] = {}
    with schema(path, "ShareGPT4V's"):
        for i, case in enumerate(_first_entries(path, count)):
            place = PurePosixPath(case["image"])
            if place.is_absolute() or ".." in place.parts:
                raise ValueError(f"the image {case['image']!r:.80} leads out of the folder")
            folders[root / place.parent] = None
            _, answer, *_ = case["conversations"]
            listings.append(listing(f"{i}", place.name, (answer["value"].replace("\n", " "),)))
    if twice := [name for name, count in Counter(item.filename for item in listings).items() if count > 1]:
        raise DataError(f"{path} names two images {twice[0]!r}")
    return records_on_disk(listings, [*folders], path, how)


def _first_entries(path: Path, count: int) -> list[Any]:
    """Of a list in JSON, of which no more is read: the one of ShareGPT4V has 1.5 GB."""
    if not is_int64(count) or count < 1:
        raise DataError(f"count must be a whole number of at least 1, got {count!r}")
    try:
        with open_regular(path) as file:
            text = file.read(MAX_START).decode(errors="replace").lstrip()
        decode, place = json.JSONDecoder().raw_decode, 1
        entries: list[Any] = []
        if not text.startswith("["):
            raise ValueError("it holds no list")
        while len(entries) < count:
            while text[place : place + 1] in (*" \t\r\n", ","):
                place += 1
            if text[place : place + 1] == "]":
                break
            _, end = decode(text, place)
            entries.append(parse_json(text[place:end], f"entry {len(entries)} of {path}"))
            place = end
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a readable JSON file: {error}") from error
    return entries


class Positives(NamedTuple):
    """Right answers to queries, by the ids of MS-COCO.

    Attributes:
        captions: image -> the ids of its own captions, in order.
        of_image: image -> captions that describe it.
        of_caption: caption -> images that it describes.
    """

    captions: Mapping[int | str, Sequence[int]]
    of_image: Mapping[int | str, Sequence[int]]
    of_caption: Mapping[int, Sequence[int]]


def cxc_positives(root: str | Path, mscoco: str | Path, split: str = "test") -> Positives:
    """Pairs with a mean grade of at least 3 in sits_test.csv or sits_val.csv, MS-COCO's own pairs among them.

    Args:
        root: folder with these files, or with them in data/, as in the repository Crisscrossed-Captions.
        mscoco: folder of MS-COCO with dataset_coco.json.
    """
    name, root = f"sits_{split}.csv", Path(root)
    how = "copy data/ of the repository google-research-datasets/Crisscrossed-Captions there"
    path = find_file("the grades of CxC", [root / name, root / "data" / name], how)
    of_image: dict[int | str, list[int]] = defaultdict(list)
    of_caption: dict[int, list[int]] = defaultdict(list)
    with schema(path, "CxC's"):
        for row in open_table(path)[1]:
            caption = int(row["caption"].rpartition(":")[2])
            image = int(PurePosixPath(row["image"]).stem.rpartition("_")[2])
            if float(row["agg_score"]) >= POSITIVE:
                of_image[image].append(caption)
                of_caption[caption].append(image)
    if not of_image:
        raise DataError(f"{path} holds no grades from {POSITIVE:.0f} on")
    return Positives(mscoco_caption_ids(mscoco, split), of_image, of_caption)


def eccv_positives(root: str | Path, mscoco: str | Path) -> Positives:
    """Pairs that machines proposed and people confirmed (Chun et al. 2022, arXiv 2204.03359), of the test split.

    Args:
        root: folder with eccv_image_to_caption.json and eccv_caption_to_image.json, or with them in eccv_caption/data/,
            as in the repository eccv-caption, or in data/, as in its package.
        mscoco: folder of MS-COCO with dataset_coco.json.
    """
    root = Path(root)
    how = "copy eccv_caption/data/ of the repository naver-ai/eccv-caption there"

    def read(name: str) -> dict[Any, list[int]]:
        places = [root / folder / name for folder in (".", "data", "eccv_caption/data")]
        path = find_file("the pairs of ECCV Caption", places, how)
        content = read_json(path, dict, MAX_BYTES)
        with schema(path, "ECCV Caption's"):
            return {int(key): [_id(value) for value in values] for key, values in content.items()}

    of_image, of_caption = read("eccv_image_to_caption.json"), read("eccv_caption_to_image.json")
    return Positives(mscoco_caption_ids(mscoco, "test"), of_image, of_caption)


def _id(value: Any) -> int:
    if not is_int64(value):
        raise TypeError(f"expected whole numbers as ids, got {value!r:.80}")
    return int(value)
