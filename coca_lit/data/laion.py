"""Pre-training on LAION or any other image-text shards in the format of img2dataset."""

import logging
from collections.abc import Sequence
from functools import cached_property

import torch
from torch.utils.data import DataLoader

from coca_lit.data.bad_samples import BadSamples
from coca_lit.data.batch import Batch
from coca_lit.data.datamodule import CaptionData
from coca_lit.data.loader import TrainLoader, outlive_signals, per_rank
from coca_lit.data.records import DataError, Record
from coca_lit.data.shard_set import Shard, find_shards
from coca_lit.data.shard_stream import ShardBatches, ShardOrder
from coca_lit.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class LaionData(CaptionData):
    """An endless stream cut into epochs of `epoch_samples`; it has no validation set.

    Args:
        shards: "FOLDER/{00000..00099}.tar", "FOLDER/*.tar" or a list of such, at least one shard per process.
        epoch_samples: of all processes together; one epoch need not be one pass over the shards. None takes the number
            in the manifests of the shards.
        batch_size: of all processes together.
        caption_key: field of each sample's JSON that holds the caption; None takes the .txt.
        shuffle_buffer: samples that each worker mixes, kept encoded in memory.
        max_bad_fraction: of broken samples, above which the training stops.
    """

    elastic = False  # the order is that of a number of processes and workers

    def __init__(
        self,
        shards: str | Sequence[str],
        epoch_samples: int | None,
        tokenizer: Tokenizer,
        batch_size: int,
        image_size: int = 224,
        num_workers: int = 0,
        seed: int = 0,
        caption_key: str | None = None,
        shuffle_buffer: int = 1000,
        max_bad_fraction: float = 0.05,
    ):
        super().__init__(tokenizer, batch_size, image_size, num_workers, seed, val_split=None)
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1 (no shuffling within a shard), not {shuffle_buffer}")
        BadSamples(max_bad_fraction)  # checks the number here rather than in a worker
        self.shards, self.caption_key = shards, caption_key
        self._epoch_samples = epoch_samples
        self.shuffle_buffer, self.max_bad_fraction = shuffle_buffer, max_bad_fraction

    def records(self, split: str) -> list[Record]:
        raise DataError(f"shards are for training only and have no split {split!r}: evaluate on another data set")

    @cached_property
    def shard_list(self) -> list[Shard]:
        return find_shards(self.shards)

    @property
    def epoch_samples(self) -> int:
        if self._epoch_samples is not None:
            return self._epoch_samples
        if not all(shard.entry for shard in self.shard_list):
            raise DataError(
                "the shards have no manifest that says how many samples they hold: write it with coca-data check, "
                "or set data.epoch_samples"
            )
        return sum(shard.entry.samples for shard in self.shard_list if shard.entry)

    @property
    def steps_per_epoch(self) -> int:
        if self.epoch_samples < self.batch_size:
            raise DataError(f"epoch_samples {self.epoch_samples} is less than one batch of {self.batch_size}")
        return self.epoch_samples // self.batch_size

    def prepare_data(self) -> None:
        _ = self.shard_list, self.steps_per_epoch

    def train_dataloader(self) -> TrainLoader:
        rank, world = self._rank_and_world()
        workers = usable_workers(len(self.shard_list), world, self.num_workers)
        order = ShardOrder(self.shard_list, self.seed, rank, world, self.shuffle_buffer, self.caption_key)
        transform, batch_size = self.train_transform(), per_rank(self.batch_size, world)

        def open_at(epoch: int, start: int) -> DataLoader[Batch]:
            batches = ShardBatches(order, transform, self.tokenizer, batch_size, epoch, start, self.max_bad_fraction)
            return DataLoader(
                batches,
                batch_size=None,
                num_workers=workers,
                worker_init_fn=outlive_signals,
                pin_memory=torch.cuda.is_available(),
            )

        return TrainLoader(self.steps_per_epoch, open_at, self._position)


def usable_workers(shards: int, world: int, num_workers: int) -> int:
    """`num_workers`, or with a warning fewer so that each has a shard; `DataError` if a process would have none."""
    if shards < world:
        raise DataError(
            f"{shards} shards cannot feed {world} processes: each needs at least one of its own, so write more and "
            "smaller shards (img2dataset --number_sample_per_shard) or use fewer processes"
        )
    if num_workers > shards // world:
        log.warning(
            "%d shards for %d processes: using %d workers each, not %d",
            shards,
            world,
            shards // world,
            num_workers,
        )
    return min(num_workers, shards // world)
