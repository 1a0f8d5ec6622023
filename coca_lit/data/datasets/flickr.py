"""Flickr8k and Flickr30k in the Karpathy split."""

from pathlib import Path
from typing import Literal

from coca_lit.data.datasets.annotations import read_karpathy
from coca_lit.data.records import Record, not_found, records_on_disk

# Names of the image folder in the Karpathy layout, in the original archives and in their mirrors.
_FOLDERS = ("images", "Images", "Flicker8k_Dataset", "flickr30k-images", ".")

FlickrName = Literal["flickr8k", "flickr30k"]


def flickr_records(root: str | Path, split: str, name: FlickrName = "flickr8k") -> list[Record]:
    """Records of "train", "val" or "test" from `root`/dataset_{name}.json and the images in or below `root`."""
    root = Path(root)
    path, how = _annotations(root, name)
    return records_on_disk(read_karpathy(path, split), [root / folder for folder in _FOLDERS], path, how)


def flickr_training_captions(root: str | Path, name: FlickrName = "flickr8k") -> list[str]:
    """All captions of the training split; the images need not exist."""
    path, _ = _annotations(Path(root), name)
    return [caption for item in read_karpathy(path, "train") for caption in item.captions]


def _annotations(root: Path, name: FlickrName) -> tuple[Path, str]:
    """The file of captions, and how to get it."""
    path = root / f"dataset_{name}.json"
    how = f"put Karpathy's {path.name} and the folder images/ with the photos of {name} into one folder"
    if not path.is_file():
        raise not_found(f"the captions of {name}", [path], how)
    return path, how
