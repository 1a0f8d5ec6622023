"""Flickr8k and Flickr30k in the Karpathy split."""

from pathlib import Path
from typing import Literal

from coca_lit.data.datamodule import CaptionDataModule
from coca_lit.data.datasets.annotations import read_karpathy
from coca_lit.data.records import Record, not_found, records_on_disk
from coca_lit.data.text_batches import TextFiles
from coca_lit.tokenizer import Tokenizer

# As our own exporters, the original archives and their mirrors name the image folder.
_FOLDERS = ("images", "Images", "Flicker8k_Dataset", "flickr30k-images", ".")

FlickrName = Literal["flickr8k", "flickr30k"]


def flickr_records(root: str | Path, split: str, name: FlickrName = "flickr8k") -> list[Record]:
    """Records of "train", "val" or "test" from `root`/dataset_{name}.json and the images in or below `root`."""
    root = Path(root)
    path, how = _annotations(root, name)
    return records_on_disk(read_karpathy(path, split), [root / folder for folder in _FOLDERS], path, how)


def flickr_training_captions(root: str | Path, name: FlickrName = "flickr8k") -> list[str]:
    """All captions of the training split; its images need not be there."""
    path, _ = _annotations(Path(root), name)
    return [caption for item in read_karpathy(path, "train") for caption in item.captions]


def _annotations(root: Path, name: FlickrName) -> tuple[Path, str]:
    """The file of captions, and how to get it."""
    path = root / f"dataset_{name}.json"
    how = f"put Karpathy's {path.name} and the folder images/ with the photos of {name} into one folder, data.root"
    if not path.is_file():
        raise not_found(f"the captions of {name}", [path], how)
    return path, how


class FlickrDataModule(CaptionDataModule):
    """Training on Flickr8k or Flickr30k, see `flickr_records`."""

    def __init__(
        self,
        root: str,
        tokenizer: Tokenizer,
        batch_size: int,
        name: FlickrName = "flickr8k",
        image_size: int = 224,
        num_workers: int = 0,
        seed: int = 0,
        train_split: str = "train",
        val_split: str | None = "val",
        text: TextFiles | None = None,
        text_every: int = 2,
        cached_augmentations: int = 0,
        cache_dir: str | None = None,
    ):
        rest = (train_split, val_split, text, text_every, cached_augmentations, cache_dir)
        super().__init__(tokenizer, batch_size, image_size, num_workers, seed, *rest)
        self.root, self.dataset = root, name  # `name` is Lightning's

    def records(self, split: str) -> list[Record]:
        return flickr_records(self.root, split, self.dataset)
