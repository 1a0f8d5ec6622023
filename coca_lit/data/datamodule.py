"""What all DataModules share: constructor arguments, loaders over records, and the trainer's position."""

from functools import cached_property
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

from coca_lit.data.batch import Batch
from coca_lit.data.examples import (
    CachedCaptionDataset,
    CachedFirstCaptionDataset,
    CaptionDataset,
    FirstCaptionDataset,
)
from coca_lit.data.feature_cache import FeatureCache
from coca_lit.data.loader import TrainLoader, open_epoch, per_rank, validation_loader
from coca_lit.data.records import Record, trainable
from coca_lit.data.text_batches import TextBatches, TextFiles, interleave_texts
from coca_lit.data.transforms import RandomCrop, TrainTransform, build_transform
from coca_lit.errors import DataError
from coca_lit.tokenizer import Tokenizer


class CaptionDataModule(LightningDataModule):
    """Base of the data sets that are a list of records per split; a subclass says how to read `records`.

    Args:
        batch_size: of all processes together.
        train_split, val_split: names that `records` understands; no validation if `val_split` is None.
        text: files of texts without images, see `read_texts`; None for none.
        text_every: every so many-th batch is one of texts, 1 for all of them.
        cached_augmentations: encode this many augmented views of every training image once, as far as the
            image encoder is frozen, and train
            on those; see `coca_lit.data.feature_cache`. 0 encodes images anew in every step.
        cache_dir: where they are kept, for all runs.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        batch_size: int,
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
        super().__init__()
        per_rank(batch_size, world=1)
        if cached_augmentations < 0:
            raise ValueError(f"cached_augmentations must be 0 or more, not {cached_augmentations}")
        if cached_augmentations and cache_dir is None:
            raise ValueError("cached_augmentations needs a folder to keep them in: set cache_dir")
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, not {num_workers}")
        self.tokenizer, self.batch_size, self.image_size = tokenizer, batch_size, image_size
        self.num_workers, self.seed = num_workers, seed
        self.train_split, self.val_split = train_split, val_split
        if not isinstance(text_every, int) or text_every < 1:
            raise ValueError(f"text_every must be a whole number of at least 1, got {text_every!r}")
        self.text_every = text_every
        self.texts = None if text is None else TextBatches(text, tokenizer, batch_size, image_size, seed)
        self.cached_augmentations, self.cache_dir = cached_augmentations, cache_dir
        self._cached: dict[str, list[Path]] = {}  # split -> files of its views

    def records(self, split: str) -> list[Record]:
        """All records of a split; raises `DataError` when the data are missing or malformed."""
        raise NotImplementedError

    @cached_property
    def train_records(self) -> list[Record]:
        return trainable(self.records(self.train_split))

    def training_captions(self) -> dict[str, tuple[str, ...]]:
        """All captions of every training image, by sample key."""
        return {str(record.id): record.captions for record in self.train_records}

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch; raises `DataError` when there is not even one."""
        if len(self.train_records) < self.batch_size:
            raise DataError(
                f"the split {self.train_split!r} has {len(self.train_records)} images, less than one batch of "
                f"{self.batch_size}: choose a smaller batch_size"
            )
        return len(self.train_records) // self.batch_size

    @property
    def world_size_invariant(self) -> bool:
        """Whether every global batch holds the same samples on any number of processes and workers."""
        return True

    def prepare_data(self) -> None:
        """Finds the training data, or raises `DataError`: called before anything slow begins."""
        _ = self.steps_per_epoch
        if self.texts is not None:
            _ = self.texts.texts

    def setup(self, stage: str) -> None:
        """Encodes what is to be cached and is not yet: the network is here, and still whole on every process."""
        if stage != "fit" or not self.cached_augmentations:
            return
        assert self.trainer is not None
        assert self.cache_dir is not None
        encoder: nn.Module = cast(Any, self.trainer.lightning_module).net.image_encoder.frozen_part()
        precision, plain = self.trainer.precision_plugin, build_transform(size=self.image_size)
        context = (precision.forward_context, precision.precision)
        views = FeatureCache(self.cache_dir, encoder, plain, self.train_transform(), self.seed, *context)
        wanted = {self.train_split: self.cached_augmentations} | ({self.val_split: 1} if self.val_split else {})
        for split, count in wanted.items():
            records = self.train_records if split == self.train_split else trainable(self.records(split))
            device = self.trainer.strategy.root_device
            self._cached[split] = views.encode(records, count, self.num_workers, device)

    def train_transform(self) -> TrainTransform:
        return RandomCrop(self.image_size)

    def train_dataloader(self) -> TrainLoader:
        dataset = self._train_dataset()
        rank, world = self._rank_and_world()
        per_rank(self.batch_size, world)

        def open_at(epoch: int, start: int) -> DataLoader[Batch]:
            return open_epoch(dataset, self.batch_size, epoch, start, rank, world, self.num_workers)

        return self._with_texts(TrainLoader(self.steps_per_epoch, open_at, self._position))

    def _with_texts(self, pairs: TrainLoader) -> TrainLoader:
        return (
            pairs
            if self.texts is None
            else interleave_texts(pairs, self.texts, self.text_every, *self._rank_and_world())
        )

    def _train_dataset(self) -> CaptionDataset:
        if views := self._cached.get(self.train_split):
            return CachedCaptionDataset(self.train_records, views, self.tokenizer, self.seed)
        return CaptionDataset(self.train_records, self.train_transform(), self.tokenizer, self.seed)

    def val_dataloader(self) -> DataLoader | list:
        if self.val_split is None:
            return []
        records = trainable(self.records(self.val_split))
        dataset: FirstCaptionDataset
        if views := self._cached.get(self.val_split):
            dataset = CachedFirstCaptionDataset(records, views[0], self.tokenizer)
        else:
            dataset = FirstCaptionDataset(records, build_transform(size=self.image_size), self.tokenizer)
        return validation_loader(dataset, self.batch_size, *self._rank_and_world(), num_workers=self.num_workers)

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _position(self) -> tuple[int, int]:
        """(epoch, batches done) by the trainer's counters, which it restores from checkpoints."""
        if not self.trainer:
            return 0, 0
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
