"""Captioned clips: MSR-VTT in its original files, and your own in a folder. `frames` is what a model sees of each.

Folders of classes, as Kinetics has them, are read by `coca_lit.data.datasets.classification`.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

from coca_lit.data.datasets.annotations import MAX_BYTES, find_file, listing, named_split, open_table, schema
from coca_lit.data.datasets.folder import folder_records
from coca_lit.data.records import ImageFile, Listing, Record, records_on_disk
from coca_lit.errors import DataError
from coca_lit.projects.video.clips import ENDINGS, ClipFile
from coca_lit.reading import read_json

log = logging.getLogger(__name__)

_FILES = ("MSRVTT_data.json", "train_val_videodatainfo.json", "test_videodatainfo.json")
_SPLITS = {"train": "train", "val": "validate", "test": "test"}
_TABLES = {"train": "MSRVTT_train.9k.csv", "test": "MSRVTT_JSFUSION_test.csv"}
_FOLDERS = ("videos/all", "videos", "TrainValVideo", "TestVideo", "all", ".")
_HOW = (
    f"put {_FILES[0]}, or {_FILES[1]} and {_FILES[2]}, and the clips, video0.mp4 and so on in videos/, into one folder"
)


def as_clips(records: Iterable[Record], frames: int) -> list[Record]:
    """The records. Video files become clips, of which a model sees `frames` frames."""
    clips: list[Record] = []
    for record in records:
        image = record.image
        if isinstance(image, ImageFile) and image.path.suffix.lower() in ENDINGS:
            record = record._replace(image=ClipFile(image.path, frames))
        clips.append(record)
    return clips


def clip_records(root: str | Path, split: str, frames: int) -> list[Record]:
    """Your own clips in a folder, with captions and splits as in `folder_records`."""
    return as_clips(folder_records(root, split, ENDINGS), frames)


def msrvtt_records(root: str | Path, split: str, frames: int, one_thousand: bool = False) -> list[Record]:
    """MSR-VTT (Xu et al. 2016): 10,000 clips with 20 captions each, in "train" (6,513), "val" (497) and "test" (2,990).

    Args:
        root: folder of MSRVTT_data.json, or of the two files of the challenge, and of the clips.
        one_thousand: the split 1k-A of Yu et al. (2018), as in papers on retrieval: "test" is the table
            MSRVTT_JSFUSION_test.csv, 1,000 clips with one sentence each, and "train" all of MSRVTT_train.9k.csv. It has
            no "val": the official one, which is in its "train", stands in with a warning.

    Raises:
        DataError: a file is missing or malformed, or there is no such split.
    """
    root = Path(root)
    official = named_split(split, _SPLITS, "MSR-VTT")
    if one_thousand and split in _TABLES:
        table = find_file("the split 1k-A of MSR-VTT", [root / _TABLES[split]], f"put {_TABLES[split]} into it")
        with schema(table, "1k-A's"):
            rows = {row["video_id"]: row for row in open_table(table)[1]}
            if split == "test":
                source = table
                listings = [listing(key, f"{key}.mp4", [row["sentence"]]) for key, row in rows.items()]
        if split == "train":
            source, found = _listings(root)
            listings = [item for item, _ in found if item.id in rows]
            if lacking := rows.keys() - {str(item.id) for item in listings}:
                raise DataError(f"{source} lacks {len(lacking)} clips of {table.name}, e.g. {min(lacking)}: {_HOW}")
    else:
        if one_thousand:
            log.warning(
                "the validation clips of MSR-VTT are among the training clips of 1k-A: score such models on test"
            )
        source, found = _listings(root)
        listings = [item for item, its in found if its == official]
    if not listings:
        raise DataError(f"{source} has no clips of the split {split!r}: {_HOW}")
    return as_clips(records_on_disk(listings, [root / name for name in _FOLDERS], source, _HOW), frames)


def _listings(root: Path) -> tuple[Path, list[tuple[Listing, str]]]:
    """All clips that the files list, each with its split."""
    first = find_file("the captions of MSR-VTT", [root / name for name in _FILES], _HOW)
    paths = [first] if first.name == _FILES[0] else [root / name for name in _FILES[1:] if (root / name).is_file()]
    found: list[tuple[Listing, str]] = []
    for path in paths:
        content = read_json(path, dict, MAX_BYTES)
        with schema(path, "MSR-VTT's"):
            captions: dict[str, list[str]] = {video["video_id"]: [] for video in content["videos"]}
            for sentence in content["sentences"]:
                captions[sentence["video_id"]].append(sentence["caption"])
            for video in content["videos"]:
                key = video["video_id"]
                found.append((listing(key, f"{key}.mp4", captions[key]), video["split"]))
    return first, found
