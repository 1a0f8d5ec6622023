"""nocaps: ten captions per image, and for each image whether COCO's classes cover it (in-, near-, out-domain)."""

from pathlib import Path

from coca_lit.data.datamodule import CaptionDataModule
from coca_lit.data.datasets.annotations import first_file, read_coco
from coca_lit.data.records import Record, not_found, records_on_disk
from coca_lit.errors import DataError
from coca_lit.tokenizer import Tokenizer

_NAMES = tuple(f"nocaps_val_{part}captions.json{end}" for part in ("4500_", "") for end in ("", ".gz"))
_HOW = "put nocaps_val_4500_captions.json of nocaps.org and its images, in images/ or val/, into one folder, data.root"


def nocaps_records(root: str | Path) -> list[Record]:
    """The validation set (the test set's captions are not public), with `domain` where the file has it.

    The domain is read from the file and never assumed: published counts per domain disagree with each other.
    """
    root = Path(root)
    folders = [root, root / "annotations"]
    path = first_file([folder / name for folder in folders for name in _NAMES])
    if path is None:
        raise not_found(f"the captions of nocaps, {_NAMES[0]},", folders, _HOW)
    return records_on_disk(read_coco(path), [root / "images", root / "val", root], path, _HOW)


class NoCapsDataModule(CaptionDataModule):
    """Evaluation on nocaps, which has no training set."""

    def __init__(
        self,
        root: str,
        tokenizer: Tokenizer,
        batch_size: int,
        image_size: int = 224,
        num_workers: int = 0,
    ):
        super().__init__(tokenizer, batch_size, image_size, num_workers)
        self.root = root

    def records(self, split: str) -> list[Record]:
        if split != "val":
            raise DataError(f"nocaps is for evaluation only and has no split {split!r}: train on data=mscoco")
        return nocaps_records(self.root)
