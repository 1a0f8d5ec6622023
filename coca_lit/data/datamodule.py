"""The LightningDataModules: what they share, one for records that a function returns, one for a function of a folder,
as most readers of `coca_lit.data.datasets` are, and one per kind of built-in scenes.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Required, TypedDict, Unpack, cast

from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

from coca_lit import extensions
from coca_lit.data.batch import Batch
from coca_lit.data.batch_schedule import BatchSchedule
from coca_lit.data.examples import CaptionDataset, FirstCaptionDataset, Index, TrainingExamples
from coca_lit.data.loader import (
    Schedule,
    ShuffledBatches,
    TrainLoader,
    per_rank,
    training_loader,
    validation_loader,
)
from coca_lit.data.mixture import Source
from coca_lit.data.records import Record, drawn, trainable
from coca_lit.data.scenes.render import scene_records
from coca_lit.data.sources import ImageSource, TrainTransform, Transform
from coca_lit.data.transforms import RandomCrop, build_transform, whole
from coca_lit.distributed import stable_seed
from coca_lit.errors import LEAST, DataError, check_names, whole_number
from coca_lit.models.inputs import InputKind
from coca_lit.tokenizer import Tokenizer


class LoaderArguments(TypedDict, total=False):
    """What every DataModule takes; `CaptionDataModule` explains it and has the defaults."""

    tokenizer: Required[Tokenizer]
    batch_size: Required[int]
    image_size: int
    num_workers: int
    seed: int
    captions: int
    batch_schedule: BatchSchedule | None


class SharedArguments(LoaderArguments, total=False):
    """What every DataModule of records takes; `RecordsDataModule` explains the rest."""

    train_split: str
    val_split: str | None
    cached_augmentations: int
    cache_dir: str | None


class SceneArguments(SharedArguments, total=False):
    """What every DataModule of built-in scenes takes; `ScenesDataModule` explains the rest."""

    train_count: int | None


class CaptionDataModule(LightningDataModule):
    """What a run needs of its data. A subclass provides `steps_per_epoch`, `training_examples` and `indices_from`.

    Args:
        batch_size: of all processes together.
        image_size: height and width in pixels.
        num_workers: processes that load and decode, per training process; 0 loads in the training process.
        seed: of order and augmentation.
        captions: of each image in a batch, drawn anew in every epoch; those after the first are in `Batch.extras`.
        batch_schedule: gives batches of another source between the batches of captioned images; None for none.
        planned: the value of a `Schedule` that a project declares, by its name; without one, or with an empty value,
            all batches have `batch_size` samples.

    Attributes:
        whole_images: for training too: nothing is cropped.
    """

    whole_images: ClassVar[bool] = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        batch_size: int,
        image_size: int = 224,
        num_workers: int = 0,
        seed: int = 0,
        captions: int = 1,
        batch_schedule: BatchSchedule | None = None,
        **planned: Annotated[Any, extensions.BATCH_SIZES],
    ) -> None:
        super().__init__()
        declared = extensions.batch_sizes()
        check_names(type(self).__name__, planned, [*LoaderArguments.__annotations__, *declared])
        keys = [name for name, value in planned.items() if value]
        if len(keys) > 1:
            raise ValueError(f"{' and '.join(keys)} plan batches in different ways: leave one of them out")
        self._schedule_class: type[Schedule] = Schedule
        self._schedule_key = ""
        self._schedule_value: Any = None
        if keys:
            self._schedule_key = keys[0]
            self._schedule_value = planned[keys[0]]
            self._schedule_class = extensions.load(declared[keys[0]].schedule)
        self.batch_size = batch_size = whole_number("batch_size", batch_size, at_least=LEAST["batch_size"])
        self.image_size = image_size = whole_number("image_size", image_size, at_least=LEAST["image_size"])
        self.num_workers = whole_number("num_workers", num_workers, at_least=LEAST["num_workers"])
        self.captions = whole_number("captions", captions, at_least=1)
        self.tokenizer = tokenizer
        self.seed = seed
        self._loader: weakref.ref[TrainLoader] | None = None
        self._passes = 0
        self.batch_schedule = batch_schedule
        if batch_schedule is not None:
            batch_schedule.begin(tokenizer, batch_size, image_size, seed)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of captioned images in an epoch; raises `DataError` when there is not even one."""
        raise NotImplementedError

    @property
    def batches_per_epoch(self) -> int:
        """Global batches in an epoch, with the further ones of `batch_schedule`."""
        pairs = self.steps_per_epoch
        return pairs if self.batch_schedule is None else self.batch_schedule.steps(pairs)

    def training_examples(self) -> TrainingExamples:
        """The captioned images of the training."""
        raise NotImplementedError

    def indices_from(self, epoch: int, start: int) -> Iterable[list[Index]]:
        """This rank's batches of indices of examples from batch `start` of an epoch on, at least to its end."""
        raise NotImplementedError

    @property
    def endless(self) -> bool:
        """Whether `indices_from` goes on with the next epochs."""
        return False

    def training_captions(self) -> dict[str, tuple[str, ...]]:
        """All captions of every training image, by sample key, for those who ask for them."""
        raise NotImplementedError

    def drawn_records(self, count: int) -> list[Record]:
        """At most `count` of the training records, to look at before the training; none where that is not cheap."""
        return []

    def state_dict(self) -> dict[str, Any]:
        return {} if self.batch_schedule is None else self.batch_schedule.state_dict()

    def changed_since(self, state: Mapping[str, Any]) -> str:
        """What changed by itself since `state_dict` returned this state, in words; nothing if nothing did."""
        return "" if self.batch_schedule is None else self.batch_schedule.changed_since(state)

    def schedule(self, samples: int) -> Schedule:
        """The batches of an epoch of that many samples."""
        return self._schedule_class(samples, self.batch_size, self._schedule_value, self.seed)

    @property
    def largest_batch(self) -> int:
        """Samples of the largest batch."""
        return self._schedule_class.largest(self.batch_size, self._schedule_value)

    def train_transform(self) -> TrainTransform:
        kind: InputKind | None = self.preprocessing.get("input_kind")
        needed = self._schedule_class.input_kind
        if needed is not None and not isinstance(kind, needed):
            raise DataError(f"data.{self._schedule_key} needs a model that takes {needed.what}")
        if kind is not None:
            return partial(kind.augmented, whole=self.whole_images)
        return whole if self.whole_images else RandomCrop(self.image_size)

    def plain_transform(self) -> Transform:
        """That of evaluations: what the network that is trained was made for."""
        return build_transform(**self.preprocessing | {"size": self.image_size})

    @property
    def preprocessing(self) -> dict[str, Any]:
        """That of the network that is trained; nothing if there is none yet."""
        net = getattr(getattr(self.trainer, "lightning_module", None), "net", None)
        return getattr(net, "preprocessing", {})

    def prepare_data(self) -> None:
        """Finds the training data, or raises `DataError`: called before anything slow begins."""
        _ = self.steps_per_epoch
        if self.batch_schedule is not None:
            self.batch_schedule.prepare()

    def train_dataloader(self) -> TrainLoader:
        """From where the trainer is: at the first batch the loader asks `position`, and then opens `_batches_from`."""
        steps, (rank, world) = self.batches_per_epoch, self.rank_and_world()
        per_rank(self.batch_size, world)
        self._examples = self.training_examples()
        batches: Callable[[int, int], Iterable[Batch]] = self._batches_from
        endless = self.endless
        if self.batch_schedule is not None:
            batches = partial(self.batch_schedule.batches, batches, self.steps_per_epoch, rank, world)
            endless = False
        loader = TrainLoader(steps, batches, self.position, endless)
        strategy = getattr(self.trainer, "strategy", None)
        if strategy:
            loader.device = strategy.root_device
        # Weak, as the loader holds this module: left in a cycle, its workers would end only when the collector comes,
        # which closes their queues first, and PyTorch would wait five seconds for each of them.
        self._loader = weakref.ref(loader)
        return loader

    def _batches_from(self, epoch: int, start: int) -> DataLoader[Batch]:
        batches = self.indices_from(epoch, start)
        return training_loader(self._examples, batches, self.tokenizer.pad_id, self.num_workers)

    def teardown(self, stage: str) -> None:
        if self._loader is not None and (loader := self._loader()) is not None:
            loader.close()

    def val_dataloader(self) -> DataLoader | list:
        return []

    def rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def position(self) -> tuple[int, int]:
        """(epoch, batches done) by the trainer's counters, which it restores from checkpoints; without a trainer each
        call begins the next epoch.
        """
        if not self.trainer:
            self._passes += 1
            return self._passes - 1, 0
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready


class RecordsDataModule(CaptionDataModule):
    """Training and validation on the records of a function, or on lists of them.

    Args:
        records: split -> its records, called when the run starts; or {split: records}. Raises `DataError` when the
            data are missing or malformed.
        train_split, val_split: splits for training and validation; None for no validation.
        cached_augmentations: 0 encodes every image in every step. N stores the output of the encoder's frozen stages
            for N augmented views of every training image, once for all runs, and trains on these, see
            `coca_lit.data.feature_cache`.
        cache_dir: folder of the stored features.
        shared: see `CaptionDataModule`.
    """

    together = 1  # training records that follow each other, also in batches

    def __init__(
        self,
        records: Callable[[str], Sequence[Record]] | Mapping[str, Sequence[Record]],
        train_split: str = "train",
        val_split: str | None = "val",
        cached_augmentations: int = 0,
        cache_dir: str | None = None,
        **shared: Unpack[LoaderArguments],
    ) -> None:
        super().__init__(**shared)
        cached_augmentations = whole_number("cached_augmentations", cached_augmentations, at_least=0)
        if cached_augmentations and cache_dir is None:
            raise ValueError("cached_augmentations needs a folder to store features in: set cache_dir")
        self.records = records if callable(records) else partial(_split_of, records)
        self.train_split = train_split
        self.val_split = val_split
        self.cached_augmentations = cached_augmentations
        self.cache_dir = cache_dir
        self._features: dict[str, list[Path]] = {}  # split -> file of each view

    @cached_property
    def train_records(self) -> list[Record]:
        return trainable(self.records(self.train_split))

    def drawn_records(self, count: int) -> list[Record]:
        return drawn(self.train_records, count)

    def training_captions(self) -> dict[str, tuple[str, ...]]:
        return {str(record.id): record.captions for record in self.train_records}

    @property
    def steps_per_epoch(self) -> int:
        images = len(self.train_records)
        batch = self.batch_size
        if images < batch:
            raise DataError(f"the split {self.train_split!r} has {images} images: lower batch_size, which is {batch}")
        return len(self.schedule(images))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | self._counted()

    def _counted(self) -> dict[str, Any]:
        return {"records": len(self.train_records), "ids": stable_seed(*(record.id for record in self.train_records))}

    def changed_since(self, state: Mapping[str, Any]) -> str:
        return described_change("records", state, self._counted()) or super().changed_since(state)

    def setup(self, stage: str) -> None:
        """Encodes what is to be cached and is not yet: now the network exists, still whole on every process."""
        if stage != "fit" or not self.cached_augmentations:
            return
        from coca_lit.data.feature_cache import FeatureCache

        assert self.trainer is not None
        assert self.cache_dir is not None
        net = cast(Any, self.trainer.lightning_module).net
        encoder: nn.Module = net.image_encoder.frozen_part()
        first = self.train_records[0].image
        if isinstance(first, ImageSource) and (reason := first.why_not_cached(net)) is not None:
            raise DataError(reason)
        precision = self.trainer.precision_plugin
        plain = self.plain_transform()
        context = (precision.forward_context, precision.precision, net.config.image_encoder_args)
        cache = FeatureCache(self.cache_dir, encoder, plain, self.train_transform(), self.seed, *context)
        wanted = {self.train_split: self.cached_augmentations}
        if self.val_split:
            wanted.setdefault(self.val_split, 1)
        for split, views in wanted.items():
            records = self.train_records if split == self.train_split else trainable(self.records(split))
            device = self.trainer.strategy.root_device
            self._features[split] = cache.encode(
                records, views, self.num_workers, device, trained=split == self.train_split
            )

    @property
    def endless(self) -> bool:
        return self.num_workers > 0  # workers live on, and are ahead when an epoch begins

    def training_examples(self) -> CaptionDataset:
        views = self._features.get(self.train_split)
        if views:
            from coca_lit.data.feature_cache import CachedCaptionDataset

            return CachedCaptionDataset(self.train_records, views, self.tokenizer, self.seed, self.captions)
        return CaptionDataset(self.train_records, self.train_transform(), self.tokenizer, self.seed, self.captions)

    def indices_from(self, epoch: int, start: int) -> ShuffledBatches:
        source = Source("", len(self.train_records))
        schedule = self.schedule(len(self.train_records))
        begin = epoch * len(schedule) + start
        end = None if self.endless else (epoch + 1) * len(schedule)
        position = (begin, end, *self.rank_and_world())
        return ShuffledBatches([source], schedule, self.seed, *position, together=self.together, by_epoch=True)

    def val_dataloader(self) -> DataLoader | list:
        if self.val_split is None:
            return []
        records = trainable(self.records(self.val_split))
        views = self._features.get(self.val_split)
        if views:
            from coca_lit.data.feature_cache import CachedFirstCaptionDataset

            dataset: FirstCaptionDataset = CachedFirstCaptionDataset(records, views[0], self.tokenizer, self.captions)
        else:
            dataset = FirstCaptionDataset(records, self.plain_transform(), self.tokenizer, self.captions)
        return validation_loader(dataset, self.batch_size, *self.rank_and_world(), num_workers=self.num_workers)


def described_change(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, whether another number of `what` is there than before, or others."""
    if all(before.get(name, value) == value for name, value in now.items()):
        return ""
    count = before.get(what, now[what])
    others = "others" if count == now[what] else now[what]
    return f"the run began with {count} {what} to train on, and now there are {others}"


def _split_of(records: Mapping[str, Sequence[Record]], split: str) -> Sequence[Record]:
    if split not in records:
        raise DataError(f"the data have the splits {', '.join(records)}, not {split!r}")
    return records[split]


class RootDataModule(RecordsDataModule):
    """Data in a folder that a function reads.

    Args:
        root: the folder.
        records: (folder, split) -> records, see `coca_lit.data.datasets`.
    """

    def __init__(
        self, root: str, records: Callable[[str, str], Sequence[Record]], **shared: Unpack[SharedArguments]
    ) -> None:
        super().__init__(partial(records, root), **shared)


class ScenesDataModule(RecordsDataModule):
    """The built-in scenes, rendered at `image_size`, see `scene_records`.

    Args:
        train_count: number of training scenes; None takes the default.
        objects: shapes per scene.
        style: of the captions, standard or narrated.
    """

    whole_images = True  # a random crop could cut away an object that the caption names

    def __init__(
        self,
        train_count: int | None = None,
        objects: int = 2,
        style: str = "standard",
        **shared: Unpack[SharedArguments],
    ) -> None:
        super().__init__(self._render, **shared)
        self.train_count = None if train_count is None else whole_number("train_count", train_count)
        self._scenes: Callable[..., list[Record]] = partial(
            scene_records, objects=whole_number("objects", objects), style=style
        )

    def _render(self, split: str) -> list[Record]:
        count = self.train_count if split == self.train_split else None
        try:
            return self._scenes(split, size=self.image_size, count=count)
        except ValueError as error:
            raise DataError(f"built-in scenes: {error}") from error
