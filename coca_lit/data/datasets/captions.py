"""Captioned images: MS-COCO in the Karpathy split (`dataset_coco.json`) or in COCO's own 2017 or 2014 split, folders in
the same schema, Flickr8k and Flickr30k in the Karpathy split, and nocaps.
"""

from pathlib import Path
from typing import Literal

from coca_lit.data.datasets.annotations import find_file, read_coco, read_karpathy
from coca_lit.data.records import Listing, Record, not_found, records_on_disk
from coca_lit.errors import DataError

_COCO = (
    "download train2017.zip, val2017.zip and annotations_trainval2017.zip from cocodataset.org, unpack them in one "
    "folder"
)
FOLDERS = ("train2014", "val2014", "train2017", "val2017", ".")
# Names of the image folder in the Karpathy layout, in the original archives and in their mirrors.
_FLICKR_FOLDERS = ("images", "Images", "Flicker8k_Dataset", "flickr30k-images", ".")
_NOCAPS_FILES = tuple(f"nocaps_val_{part}captions.json{end}" for part in ("4500_", "") for end in ("", ".gz"))
_NOCAPS = "put nocaps_val_4500_captions.json of nocaps.org and its images, in images/ or val/, into one folder"

FlickrName = Literal["flickr8k", "flickr30k"]


def mscoco_records(root: str | Path, split: str, karpathy: str | Path | None = None) -> list[Record]:
    """Records of "train", "val" or, in the Karpathy split only, "test".

    Args:
        root: folder with train2017/ val2017/ or train2014/ val2014/ (or images/ with those inside) and annotations/.
        karpathy: `dataset_coco.json`; by default used if it lies in `root` or its annotations/. Without it "val" is
            val2017 (5,000 images, not Karpathy's test set) or val2014 (40,504 images).
    """
    root = Path(root)
    folders = [base / name for base in (root, root / "images") for name in FOLDERS]
    path = _karpathy_file(root, karpathy)
    if path:
        listings = read_karpathy(path, split)
        return records_on_disk(names_on_disk(listings, folders), folders, path, _COCO)
    path = _official_file(root, split)
    folder = path.stem.removeprefix("captions_")  # e.g. val2017
    return records_on_disk(read_coco(path), [root / folder, root / "images" / folder], path, _COCO)


def mscoco_training_captions(root: str | Path, karpathy: str | Path | None = None) -> list[str]:
    """All captions of the training split, see `mscoco_records`; the images need not exist."""
    path = _karpathy_file(Path(root), karpathy)
    listings = read_karpathy(path, "train") if path else read_coco(_official_file(Path(root), "train"))
    return [caption for item in listings for caption in item.captions]


def _karpathy_file(root: Path, karpathy: str | Path | None) -> Path | None:
    if karpathy:
        how = "pass your dataset_coco.json as data.records.karpathy"
        return find_file("the Karpathy split of MS-COCO", [Path(karpathy)], how)
    usual = [root / "dataset_coco.json", root / "annotations/dataset_coco.json"]
    return next(filter(Path.is_file, usual), None)


def _official_file(root: Path, split: str) -> Path:
    if split == "test":
        how = "put Karpathy's dataset_coco.json into that folder; the validation set needs none: scoring.split=val"
        raise not_found(
            "the Karpathy split of MS-COCO, which alone has a public test set,", [root, root / "annotations"], how
        )
    if split not in ("train", "val"):
        raise DataError(f"MS-COCO without dataset_coco.json has the splits train and val, not {split!r}")
    candidates = [root / f"annotations/captions_{split}{year}.json" for year in (2017, 2014)]
    return find_file("MS-COCO captions", [*candidates, root / "dataset_coco.json"], _COCO)


def names_on_disk(listings: list[Listing], folders: list[Path]) -> list[Listing]:
    """Karpathy uses the names of 2014, COCO_val2014_000000000042.jpg; in 2017 that image is 000000000042.jpg."""
    present = {folder.name for folder in folders if folder.is_dir()}
    if present & {"train2017", "val2017"} and not present & {"train2014", "val2014"}:
        return [item._replace(filename=item.filename.rsplit("_", 1)[-1]) for item in listings]
    return listings


def coco_folder_records(root: str | Path, annotations: str = "captions.json", images: str = "images") -> list[Record]:
    """Records of any folder of images with captions in the schema of COCO, to evaluate on your own data.

    Args:
        annotations: file in `root`, {"images": [{id, file_name}], "annotations": [{image_id, caption}]}; may be
            .json.gz. An image may have any number of captions, and a "domain", by which it is scored separately.
        images: folder in `root`.
    """
    how = "put captions.json and images/ into one folder, or name them by records.annotations and records.images"
    path = find_file("the file of captions", [Path(root) / annotations], how)
    return records_on_disk(read_coco(path), [Path(root) / images], path, how)


def flickr_records(root: str | Path, split: str, name: FlickrName = "flickr8k") -> list[Record]:
    """Records of "train", "val" or "test" from `root`/dataset_{name}.json and the images in or below `root`."""
    root = Path(root)
    path, how = _flickr_file(root, name)
    return records_on_disk(read_karpathy(path, split), [root / folder for folder in _FLICKR_FOLDERS], path, how)


def flickr_training_captions(root: str | Path, name: FlickrName = "flickr8k") -> list[str]:
    """All captions of the training split; the images need not exist."""
    path, _ = _flickr_file(Path(root), name)
    return [caption for item in read_karpathy(path, "train") for caption in item.captions]


def _flickr_file(root: Path, name: FlickrName) -> tuple[Path, str]:
    """The file of captions, and how to get it."""
    how = f"put Karpathy's dataset_{name}.json and the folder images/ with the photos of {name} into one folder"
    return find_file(f"the captions of {name}", [root / f"dataset_{name}.json"], how), how


def nocaps_records(root: str | Path, split: str = "val") -> list[Record]:
    """The validation set: ten captions per image, and whether COCO's classes cover it (in-, near-, out-domain) as the
    `domain`, where the file has it. There is no training set, no public test set.

    The domain is read from the file and never assumed: published counts per domain disagree with each other.
    """
    if split != "val":
        raise DataError(f"nocaps is for evaluation only and has no split {split!r}: train on data=mscoco")
    root = Path(root)
    folders = [root, root / "annotations"]
    path = next(filter(Path.is_file, (folder / name for folder in folders for name in _NOCAPS_FILES)), None)
    if path is None:
        raise not_found(f"the captions of nocaps, {_NOCAPS_FILES[0]},", folders, _NOCAPS)
    return records_on_disk(read_coco(path), [root / "images", root / "val", root], path, _NOCAPS)
