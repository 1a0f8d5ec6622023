"""The built-in data set as a DataModule: rendered on the fly, nothing to download."""

from coca_lit.data.datamodule import CaptionDataModule
from coca_lit.data.records import Record
from coca_lit.data.scenes.render import scene_records
from coca_lit.data.text_batches import TextFiles
from coca_lit.data.transforms import TrainTransform, whole
from coca_lit.errors import DataError
from coca_lit.tokenizer import Tokenizer


class ScenesDataModule(CaptionDataModule):
    """Scenes rendered at `image_size`.

    Args:
        train_count: number of training scenes; None takes the default of `scene_records`.
        objects: shapes per scene.
        style: of the captions, standard or narrated.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        batch_size: int,
        image_size: int = 32,
        train_count: int | None = None,
        objects: int = 2,
        num_workers: int = 0,
        seed: int = 0,
        train_split: str = "train",
        val_split: str | None = "val",
        style: str = "standard",
        text: TextFiles | None = None,
        text_every: int = 2,
        cached_augmentations: int = 0,
        cache_dir: str | None = None,
    ):
        rest = (train_split, val_split, text, text_every, cached_augmentations, cache_dir)
        super().__init__(tokenizer, batch_size, image_size, num_workers, seed, *rest)
        self.train_count, self.objects, self.style = train_count, objects, style

    def records(self, split: str) -> list[Record]:
        count = self.train_count if split == self.train_split else None
        try:
            return scene_records(split, size=self.image_size, count=count, objects=self.objects, style=self.style)
        except ValueError as error:
            raise DataError(f"data=scenes: {error}") from error

    def train_transform(self) -> TrainTransform:
        return whole  # a random crop could cut away an object that the caption names
