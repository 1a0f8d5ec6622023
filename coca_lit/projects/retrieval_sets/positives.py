"""Which captions of MS-COCO describe which of its images, among them captions that were written for other images:
CrissCrossed Captions and ECCV Caption, in the published files.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from coca_lit.data.datasets.annotations import MAX_BYTES, check_id, find_file, open_table, schema
from coca_lit.errors import DataError
from coca_lit.reading import is_int64, read_json

POSITIVE = 3.0  # of CxC's grades from 0 to 5, the least of a pair that fits (Parekh et al. 2021, arXiv 2004.15020)


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
    root = Path(root)
    name = f"sits_{split}.csv"
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
    return Positives(caption_ids(mscoco, split), of_image, of_caption)


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

    of_image = read("eccv_image_to_caption.json")
    of_caption = read("eccv_caption_to_image.json")
    return Positives(caption_ids(mscoco, "test"), of_image, of_caption)


def caption_ids(mscoco: str | Path, split: str) -> dict[int | str, tuple[int, ...]]:
    """The ids of the captions of each image of the Karpathy split, in the order of its records."""
    folder = Path(mscoco)
    places = [folder / "dataset_coco.json", folder / "annotations" / "dataset_coco.json"]
    path = find_file("the Karpathy split of MS-COCO", places, "put dataset_coco.json there")
    content = read_json(path, limit=MAX_BYTES)
    ids: dict[int | str, tuple[int, ...]] = {}
    with schema(path, "Karpathy's"):
        for image in content["images"]:
            if image["split"] == split:
                own = tuple(sentence["sentid"] for sentence in image["sentences"])
                if not all(map(is_int64, own)):
                    raise TypeError(f"expected whole numbers as ids of captions, got {own!r:.80}")
                ids[check_id(image.get("cocoid", image["imgid"]))] = own
    return ids


def _id(value: Any) -> int:
    if not is_int64(value):
        raise TypeError(f"expected whole numbers as ids, got {value!r:.80}")
    return int(value)
