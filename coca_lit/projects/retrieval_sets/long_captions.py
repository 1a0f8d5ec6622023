"""Images with captions of several sentences, in the published files: Urban1k, DOCCI, ShareGPT4V.

Long captions exceed the context of most models; `RetrievalScores` reports what a model does not read.
"""

import json
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from coca_lit.data.datasets.annotations import find_file, listing, read_json_lines, schema
from coca_lit.data.pixels import SUFFIXES
from coca_lit.data.records import Listing, Record, not_found, records_on_disk
from coca_lit.errors import DataError
from coca_lit.reading import is_int64, open_regular, parse_json

MAX_CAPTION = 2**20  # bytes
MAX_START = 64 * 2**20  # bytes of a list that are read to find its first entries


def urban1k_records(root: str | Path) -> list[Record]:
    """Urban1k (Zhang et al. 2024, arXiv 2403.15378), and any folder in its layout: image/NAME.jpg, or images/, with a
    caption in caption/NAME.txt.
    """
    root = Path(root)
    how = "unpack Urban1k.zip, with caption/ and image/, there"
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
    root = Path(root)
    how = "put the list of ShareGPT4V and the folders of images that it names there"
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
    occurrences = Counter(item.filename for item in listings)
    twice = [name for name, number in occurrences.items() if number > 1]
    if twice:
        raise DataError(f"{path} names two images {twice[0]!r}")
    return records_on_disk(listings, [*folders], path, how)


def _first_entries(path: Path, count: int) -> list[Any]:
    """Of a list in JSON, of which no more is read: the one of ShareGPT4V has 1.5 GB."""
    if not is_int64(count) or count < 1:
        raise DataError(f"count must be a whole number of at least 1, got {count!r}")
    try:
        with open_regular(path) as file:
            text = file.read(MAX_START).decode(errors="replace").lstrip()
        if not text.startswith("["):
            raise ValueError("it holds no list")
        decode = json.JSONDecoder().raw_decode
        place = 1
        entries: list[Any] = []
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
