"""Pre-training on LAION or any other image-text shards in the format of img2dataset."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from coca_lit.data.bad_samples import BadSamples
from coca_lit.data.batch import Batch
from coca_lit.data.datamodule import CaptionData
from coca_lit.data.loader import TrainLoader, outlive_signals, per_rank
from coca_lit.data.mixture import Source, check_weights
from coca_lit.data.records import DataError, Record
from coca_lit.data.remote import ShardCache
from coca_lit.data.shard_set import find_shards
from coca_lit.data.shard_stream import ShardBatches, ShardOrder
from coca_lit.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Shards = str | Sequence[str]


class LaionData(CaptionData):
    """An endless stream cut into epochs of `epoch_samples`; it has no validation set.

    Args:
        shards: "FOLDER/{00000..00099}.tar", "FOLDER/*.tar", "s3://BUCKET/FOLDER" or a list of such, at least one shard
            per process; for a mixture {name: such}.
        epoch_samples: of all processes together; one epoch need not be one pass over the shards. None takes the number
            in the manifests of the shards.
        batch_size: of all processes together.
        weights: {name: share} of a mixture, kept in every stretch of the stream. None takes the sources in proportion
            to the samples in their manifests.
        caption_keys: where the caption stands: "txt", or a field of each sample's JSON; for several {key: probability},
            of which each sample draws one anew in every pass.
        shuffle_buffer: samples that each worker mixes, kept encoded in memory.
        max_bad_fraction: of broken samples, above which the training stops.
        cache_dir, cache_gb: local copies of shards on an object store, shared by the processes of a machine.
    """

    elastic = False  # the order is that of a number of processes and workers

    def __init__(
        self,
        shards: Shards | Mapping[str, Shards],
        epoch_samples: int | None,
        tokenizer: Tokenizer,
        batch_size: int,
        image_size: int = 224,
        num_workers: int = 0,
        seed: int = 0,
        weights: Mapping[str, float] | None = None,
        caption_keys: str | Mapping[str, float] = "txt",
        shuffle_buffer: int = 1000,
        max_bad_fraction: float = 0.05,
        cache_dir: str = "~/.cache/coca_lit/shards",
        cache_gb: float = 100,
    ):
        super().__init__(tokenizer, batch_size, image_size, num_workers, seed, val_split=None)
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1 (no shuffling within a shard), not {shuffle_buffer}")
        if cache_gb <= 0:
            raise ValueError(f"cache_gb must be above 0, not {cache_gb}")
        BadSamples(max_bad_fraction)  # checks the number here rather than in a worker
        keys = {caption_keys: 1.0} if isinstance(caption_keys, str) else caption_keys
        self.caption_keys = check_weights("caption_keys", keys)
        self.shards = dict(shards) if isinstance(shards, Mapping) else {"": shards}
        self.weights = None if weights is None else check_weights("weights", weights)
        if self.weights is not None and self.weights.keys() != self.shards.keys():
            names = " and ".join(", ".join(map(repr, names)) for names in (self.shards, self.weights))
            raise ValueError(f"shards and weights must have the same names, not {names}")
        self._epoch_samples = epoch_samples
        self.shuffle_buffer, self.max_bad_fraction = shuffle_buffer, max_bad_fraction
        self.cache = ShardCache(Path(cache_dir).expanduser(), int(cache_gb * 1e9))

    def records(self, split: str) -> list[Record]:
        raise DataError(f"shards are for training only and have no split {split!r}: evaluate on another data set")

    @cached_property
    def sources(self) -> list[Source]:
        found = [Source(name, find_shards(shards, self.cache)) for name, shards in self.shards.items()]
        if self.weights is not None:
            return [source._replace(weight=self.weights[source.name]) for source in found]
        if len(found) == 1:
            return found
        return [source._replace(weight=_samples(source, "data.weights")) for source in found]

    @property
    def epoch_samples(self) -> int:
        if self._epoch_samples is not None:
            return self._epoch_samples
        return sum(_samples(source, "data.epoch_samples") for source in self.sources)

    @property
    def steps_per_epoch(self) -> int:
        if self.epoch_samples < self.batch_size:
            raise DataError(f"epoch_samples {self.epoch_samples} is less than one batch of {self.batch_size}")
        return self.epoch_samples // self.batch_size

    def prepare_data(self) -> None:
        _ = self.sources, self.steps_per_epoch

    def train_dataloader(self) -> TrainLoader:
        rank, world = self._rank_and_world()
        workers = min(usable_workers(source, world, self.num_workers) for source in self.sources)
        order = ShardOrder(self.sources, self.seed, rank, world, self.shuffle_buffer, self.caption_keys)
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


def _samples(source: Source, otherwise: str) -> int:
    """How many the manifests say."""
    if not all(shard.entry for shard in source.shards):
        what = f"of {source.name!r} " if source.name else ""
        raise DataError(
            f"the shards {what}have no manifest that says how many samples they hold: write it with coca-data check, "
            f"or set {otherwise}"
        )
    return sum(shard.entry.samples for shard in source.shards if shard.entry)


def usable_workers(source: Source, world: int, num_workers: int) -> int:
    """`num_workers`, or with a warning fewer so that each has a shard; `DataError` if a process would have none."""
    shards = len(source.shards)
    what = "shard" if shards == 1 else "shards"
    what = f"{what} of {source.name!r}" if source.name else what
    if shards < world:
        raise DataError(
            f"{shards} {what} cannot feed {world} processes: each needs at least one of its own, so write more and "
            "smaller shards (img2dataset --number_sample_per_shard) or use fewer processes"
        )
    if num_workers > shards // world:
        counts = (shards, what, world, shards // world, num_workers)
        log.warning("%d %s for %d processes: using %d workers each, not %d", *counts)
    return min(num_workers, shards // world)
