"""nocaps: ten captions per image, and for each image whether COCO's classes cover it (in-, near-, out-domain)."""

from pathlib import Path

from coca_lit.data.datasets.annotations import first_file, read_coco
from coca_lit.data.records import Record, not_found, records_on_disk
from coca_lit.errors import DataError

_NAMES = tuple(f"nocaps_val_{part}captions.json{end}" for part in ("4500_", "") for end in ("", ".gz"))
_HOW = "put nocaps_val_4500_captions.json of nocaps.org and its images, in images/ or val/, into one folder"


def nocaps_records(root: str | Path, split: str = "val") -> list[Record]:
    """The validation set, with `domain` where the file has it. There is no training set, no public test set.

    The domain is read from the file and never assumed: published counts per domain disagree with each other.
    """
    if split != "val":
        raise DataError(f"nocaps is for evaluation only and has no split {split!r}: train on data=mscoco")
    root = Path(root)
    folders = [root, root / "annotations"]
    path = first_file([folder / name for folder in folders for name in _NAMES])
    if path is None:
        raise not_found(f"the captions of nocaps, {_NAMES[0]},", folders, _HOW)
    return records_on_disk(read_coco(path), [root / "images", root / "val", root], path, _HOW)
