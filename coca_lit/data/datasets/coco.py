"""MS-COCO captions in the Karpathy split (`dataset_coco.json`) or in COCO's own 2017 or 2014 split, and folders in
the same schema.
"""

from pathlib import Path

from coca_lit.data.datasets.annotations import first_file, read_coco, read_karpathy
from coca_lit.data.records import Listing, Record, not_found, records_on_disk
from coca_lit.errors import DataError

_HOW = (
    "download train2017.zip, val2017.zip and annotations_trainval2017.zip from cocodataset.org, unpack them in one "
    "folder"
)
FOLDERS = ("train2014", "val2014", "train2017", "val2017", ".")


def mscoco_records(root: str | Path, split: str, karpathy: str | Path | None = None) -> list[Record]:
    """Records of "train", "val" or, in the Karpathy split only, "test".

    Args:
        root: folder with train2017/ val2017/ or train2014/ val2014/ (or images/ with those inside) and annotations/.
        karpathy: `dataset_coco.json`; by default used if it lies in `root` or its annotations/. Without it "val" is
            val2017 (5,000 images, not Karpathy's test set) or val2014 (40,504 images).
    """
    root = Path(root)
    folders = [base / name for base in (root, root / "images") for name in FOLDERS]
    if path := _karpathy_file(root, karpathy):
        listings = read_karpathy(path, split)
        return records_on_disk(names_on_disk(listings, folders), folders, path, _HOW)
    path = _official_file(root, split)
    folder = path.stem.removeprefix("captions_")  # e.g. val2017
    return records_on_disk(read_coco(path), [root / folder, root / "images" / folder], path, _HOW)


def mscoco_training_captions(root: str | Path, karpathy: str | Path | None = None) -> list[str]:
    """All captions of the training split, see `mscoco_records`; the images need not exist."""
    path = _karpathy_file(Path(root), karpathy)
    listings = read_karpathy(path, "train") if path else read_coco(_official_file(Path(root), "train"))
    return [caption for item in listings for caption in item.captions]


def _karpathy_file(root: Path, karpathy: str | Path | None) -> Path | None:
    candidates = [Path(karpathy)] if karpathy else [root / "dataset_coco.json", root / "annotations/dataset_coco.json"]
    path = first_file(candidates)
    if karpathy and not path:
        raise not_found("the Karpathy split of MS-COCO", candidates, "pass your dataset_coco.json as data.karpathy")
    return path


def _official_file(root: Path, split: str) -> Path:
    if split == "test":
        how = "put Karpathy's dataset_coco.json into that folder; the validation set needs none: scoring.split=val"
        raise not_found(
            "the Karpathy split of MS-COCO, which alone has a public test set,", [root, root / "annotations"], how
        )
    if split not in ("train", "val"):
        raise DataError(f"MS-COCO without dataset_coco.json has the splits train and val, not {split!r}")
    candidates = [root / f"annotations/captions_{split}{year}.json" for year in (2017, 2014)]
    path = first_file(candidates)
    if path is None:
        raise not_found("MS-COCO captions", [root / "dataset_coco.json", *candidates], _HOW)
    return path


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
    path, folder = Path(root) / annotations, Path(root) / images
    how = "put captions.json and images/ into one folder, or name them by records.annotations and records.images"
    if not path.is_file():
        raise not_found("the file of captions", [path], how)
    return records_on_disk(read_coco(path), [folder], path, how)
