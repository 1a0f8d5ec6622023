"""Pre-training on LAION or any other image-text shards in the format of img2dataset.

Uncompressed shards are indexed: local ones up to `AUTO_BYTES` are shuffled as a whole, others in windows.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

from torch.utils.data import DataLoader

from coca_lit.data.bad_samples import BadSamples
from coca_lit.data.batch import Batch, check_decoder
from coca_lit.data.datamodule import CaptionDataModule, LoaderArguments
from coca_lit.data.loader import TrainLoader, load, loading, per_rank
from coca_lit.data.shards.cache import ShardCache
from coca_lit.data.shards.indexed import IndexedBatches, IndexedShards, TarIndex, tar_indexes
from coca_lit.data.shards.listing import Shard, find_shards, selected
from coca_lit.data.shards.mixture import Source, check_weights
from coca_lit.data.shards.reader import Preprocess
from coca_lit.data.shards.selection import Selection, read_selection
from coca_lit.data.shards.store import PATIENCE
from coca_lit.data.shards.stream import OPEN_SHARDS, SHUFFLE_BUFFER, ShardBatches, ShardOrder
from coca_lit.data.shards.windows import WindowedBatches, Windows
from coca_lit.data.transforms import CropOfEncoded, RandomCrop, TrainTransform
from coca_lit.errors import DataError

log = logging.getLogger(__name__)

Patterns = str | Sequence[str]
Decode = Literal["full", "reduced", "device"]
AUTO_BYTES = 100 * 10**9  # of shards: what page caches and SSDs still serve in any order


class LAIONDataModule(CaptionDataModule):
    """Endless passes over the shards, cut into epochs of `epoch_samples`; there is no validation set.

    Args:
        shards: "FOLDER/{00000..00099}.tar", "FOLDER/*.tar", "s3://BUCKET/FOLDER", "hf://datasets/ORG/NAME/*.tar" or a
            list of these; for a mixture {name: the same}. A data set on the Hub is read at the commit that its revision
            (NAME@REVISION, else main) has when the run starts, also after a resume. A stream needs a shard of each
            source for every process.
        epoch_samples: of all processes together; need not be one pass over the shards. None takes the number of
            samples in the indexes or, for a stream, in the manifests of the shards.
        weights: {name: share} of a mixture, held throughout training. None makes them proportional to the number of
            samples, found as for `epoch_samples`.
        selection: file of the samples to read, see `coca_lit.data.shards.selection`; for a mixture {name: file}, where
            sets without one are read whole. None reads all.
        caption_keys: "txt", or a field of each sample's JSON; for several {key: probability}, one of which is drawn
            for each sample in every pass.
        indexed: True uses `coca_lit.data.shards.indexed`, False `coca_lit.data.shards.stream`; "auto" indexes all but
            compressed shards. Remote shards, and with "auto" local ones of more than `AUTO_BYTES`, are shuffled in
            windows, see `coca_lit.data.shards.windows`; others all at once.
        window, window_gb: size of a shuffled window in samples and in GB of shards; the smaller limit applies.
        readers: logical readers of windows, each with its own shards; reduced to a divisor of `batch_size`.
        shuffle_buffer: samples of a stream that each worker shuffles, read from several shards at a time and kept
            encoded in memory: as many as fit into `coca_lit.data.shards.stream.MAX_BUFFER` bytes.
        max_bad_fraction: share of broken samples, or of torn or empty shards, above which training stops.
        cache_dir, cache_gb: folder and size of the cache of remote shards, shared by the processes of a machine.
        decode: full: workers decode whole JPEGs. reduced: workers decode large ones at 1/2, 1/4 or 1/8 of their size,
            if the crop keeps four times the wanted pixels on each side. device: workers only read and check; the
            device of the training decodes, crops and resizes (nvJPEG on a GPU). Images of any shape need full.
        store_patience: seconds that an object store may be unreachable before the run stops, see
            `coca_lit.data.shards.store`.
        shared: see `CaptionDataModule`.
    """

    def __init__(
        self,
        shards: Patterns | Mapping[str, Patterns],
        epoch_samples: int | None,
        weights: Mapping[str, float] | None = None,
        selection: str | Mapping[str, str] | None = None,
        caption_keys: str | Mapping[str, float] = "txt",
        indexed: bool | Literal["auto"] = "auto",
        window: int = 262_144,
        window_gb: float = 10,
        readers: int = 16,
        shuffle_buffer: int = SHUFFLE_BUFFER,
        max_bad_fraction: float = 0.05,
        cache_dir: str = "~/.cache/coca_lit/shards",
        cache_gb: float = 100,
        decode: Decode = "full",
        store_patience: float = PATIENCE,
        **shared: Unpack[LoaderArguments],
    ) -> None:
        super().__init__(**shared)
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1 (no shuffling within a shard), not {shuffle_buffer}")
        if indexed not in (True, False, "auto"):
            raise ValueError(f"indexed must be true, false or auto, not {indexed!r}")
        if min(window, window_gb, readers) <= 0:
            raise ValueError(f"window, window_gb and readers must be above 0, not {window}, {window_gb}, {readers}")
        if cache_gb <= 0:
            raise ValueError(f"cache_gb must be above 0, not {cache_gb}")
        if decode not in get_args(Decode):
            raise ValueError(f"decode must be one of {', '.join(get_args(Decode))}, not {decode!r}")
        if not store_patience >= 0:
            raise ValueError(f"store_patience must be at least 0 seconds, not {store_patience}")
        BadSamples(max_bad_fraction)  # checks the number here rather than in a worker
        keys = {caption_keys: 1.0} if isinstance(caption_keys, str) else caption_keys
        self.caption_keys = check_weights("caption_keys", keys)
        self.patterns = dict(shards) if isinstance(shards, Mapping) else {"": shards}
        self.weights = None if weights is None else check_weights("weights", weights)
        if self.weights is not None and self.weights.keys() != self.patterns.keys():
            names = " and ".join(", ".join(map(repr, names)) for names in (self.patterns, self.weights))
            raise ValueError(f"shards and weights must have the same names, not {names}")
        self.selections = dict(selection) if isinstance(selection, Mapping) else {"": selection} if selection else {}
        if unknown := sorted(self.selections.keys() - self.patterns.keys()):
            what = f"one for {unknown[0]!r}" if unknown[0] else "one without a name"
            known = ", ".join(filter(None, self.patterns)) or "no names"
            raise ValueError(f"a selection belongs to a set of shards: got {what}, but the shards have {known}")
        self._epoch_samples, self._indexed, self.decode = epoch_samples, indexed, decode
        self.windows = Windows(window, window_gb * 1e9, math.gcd(readers, self.batch_size))
        self.shuffle_buffer, self.max_bad_fraction = shuffle_buffer, max_bad_fraction
        self.commits: dict[str, str] = {}  # at which data sets on the Hub are read, by "ORG/NAME@REVISION"
        self.cache = ShardCache(Path(cache_dir).expanduser(), int(cache_gb * 1e9), store_patience)

    def training_captions(self) -> dict[str, tuple[str, ...]]:
        raise DataError(
            "shards do not list their captions, and `vocabulary` and `model.self_critical` need all of them: use "
            "data=mscoco, flickr30k, flickr8k or scenes"
        )

    @cached_property
    def shards(self) -> dict[str, list[Shard]]:
        """By the name of their source; shards of which nothing is selected are left out."""
        found = {name: find_shards(patterns, self.cache, self.commits) for name, patterns in self.patterns.items()}
        return found | {name: selected(found[name], chosen) for name, chosen in self.chosen.items()}

    @cached_property
    def chosen(self) -> dict[str, Selection]:
        """The selections, by the name of their source."""
        return {name: read_selection(Path(path)) for name, path in self.selections.items()}

    @cached_property
    def order(self) -> Literal["all", "windows", "stream"]:
        """What is shuffled at a time: all samples, windows of them, or what passes by."""
        shards = [shard for of_source in self.shards.values() for shard in of_source]
        packed = next((shard.name for shard in shards if not shard.name.endswith(".tar")), None)
        if self._indexed is True and packed:
            raise DataError(
                f"data.indexed=true needs uncompressed .tar files, unlike {packed}: unpack it, or use a stream"
            )
        if packed or not self._indexed:
            return "stream"
        remote = [shard.stored.bytes for shard in shards if shard.stored]
        if not remote:
            small = self._indexed is True or sum(os.path.getsize(shard.name) for shard in shards) <= AUTO_BYTES
            return "all" if small else "windows"
        needed = min(sum(remote), self.windows.cache_bytes(max(remote), len(self.shards)))
        if needed > self.cache.max_bytes:
            limit, wanted, largest = (f"{n / 1e9:.3g} GB" for n in (self.cache.max_bytes, needed, max(remote)))
            raise DataError(
                f"windows of shards of up to {largest} need a cache of {wanted}, not of {limit}: raise data.cache_gb, "
                "lower data.window_gb or data.readers, or use a stream with data.indexed=false"
            )
        return "windows"

    @property
    def indexed(self) -> bool:
        """Whether the shards are indexed, rather than streamed."""
        return self.order != "stream"

    @property
    def world_size_invariant(self) -> bool:
        return self.indexed

    @cached_property
    def indexes(self) -> dict[str, list[TarIndex]]:
        """By the name of their source; raises `DataError` when too much is missing in the shards."""
        all_shards = [shard for shards in self.shards.values() for shard in shards]
        found = iter(tar_indexes(all_shards, self.cache.folder / "indexes"))
        indexes = {name: [*islice(found, len(shards))] for name, shards in self.shards.items()}
        bad = BadSamples(self.max_bad_fraction)
        pairs = [pair for name in indexes for pair in zip(self.shards[name], indexes[name], strict=True)]
        bad.seen = sum(len(index) for _, index in pairs)
        for shard, index in sorted(pairs, key=lambda pair: pair[1].is_torn):  # whole ones tell how many samples one has
            if not index.is_torn:
                bad.end_of_shard(len(index))
            for fault in index.faults:
                if fault.key:
                    bad.seen += 1
                    bad.add(fault.reason, fault.shard, fault.key, fault.detail)
                else:
                    bad.lose(fault.reason, fault.shard, shard.samples, len(index), fault.detail)
        bad.end_of_pass()
        return indexes

    @cached_property
    def sources(self) -> list[Source[Shard]]:
        one = len(self.shards) == 1
        weights = self.weights or {name: 1.0 if one else self._samples(name, "data.weights") for name in self.shards}
        return [Source(name, shards, weights[name]) for name, shards in self.shards.items()]

    @property
    def epoch_samples(self) -> int:
        if self._epoch_samples is not None:
            return self._epoch_samples
        return sum(self._samples(name, "data.epoch_samples") for name in self.shards)

    def _samples(self, source: str, otherwise: str) -> int:
        """Number of samples by the indexes or, for a stream, the manifests; `otherwise` is a key that can set it."""
        if self.indexed:
            return sum(map(len, self.indexes[source]))
        shards = self.shards[source]
        if any(shard.samples is None for shard in shards):
            what = f"of {source!r} " if source else ""
            raise DataError(
                f"the shards {what}have no manifest that says how many samples they hold: write it with coca-data "
                f"check, or set {otherwise}"
            )
        return sum(shard.samples or 0 for shard in shards)

    @property
    def steps_per_epoch(self) -> int:
        if self.epoch_samples < self.batch_size:
            raise DataError(f"epoch_samples {self.epoch_samples} is less than one batch of {self.batch_size}")
        return len(self.schedule(self.epoch_samples))

    def prepare_data(self) -> None:
        _ = self.sources, self.indexed and self.indexes
        super().prepare_data()

    def setup(self, stage: str) -> None:
        """All processes read the commits that the first one found."""
        if self.trainer and "hf://" in str(self.patterns):
            self._read_at(self.trainer.strategy.broadcast(self.commits))

    def state_dict(self) -> dict[str, Any]:
        digests = {name: chosen.digest for name, chosen in self.chosen.items()}
        state = {"commits": self.commits, "selections": digests}
        return {name: value for name, value in state.items() if value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises `DataError` if a selection is not the one that the run began with."""
        for name, digest in state_dict.get("selections", {}).items():
            if name in self.chosen and self.chosen[name].digest != digest:
                raise DataError(
                    f"{self.selections[name]} is not the selection that the checkpoint was trained on: restore the "
                    "file, or give the run another name"
                )
        self._read_at(state_dict.get("commits", self.commits))

    def _read_at(self, commits: dict[str, str]) -> None:
        if commits != self.commits:
            self.commits = commits
            for name in ("shards", "order", "indexes", "sources"):  # what was listed before
                self.__dict__.pop(name, None)

    def _transform(self) -> TrainTransform | CropOfEncoded:
        plain = self.train_transform()
        if self.decode == "full":
            return plain
        if not isinstance(plain, RandomCrop):
            raise DataError(
                f"data.decode={self.decode} makes square images; for images of any shape take data.decode=full"
            )
        if self.decode == "device" and self.trainer:
            check_decoder(self.trainer.strategy.root_device)
        return CropOfEncoded(plain.size, self.decode)

    def pair_loader(self, rank: int, world: int) -> TrainLoader:
        return self._indexed_loader(rank, world) if self.indexed else self._stream_loader(rank, world)

    def _indexed_loader(self, rank: int, world: int) -> TrainLoader:
        sources = [Source(source.name, self.indexes[source.name], source.weight) for source in self.sources]
        preprocess = Preprocess(self._transform(), self.tokenizer, self.caption_keys, self.seed)
        in_windows, steps, schedule = self.order == "windows", self.steps_per_epoch, self.schedule(self.epoch_samples)
        examples = IndexedShards(sources, preprocess, self.max_bad_fraction, near=in_windows)

        def open_at(epoch: int, start: int) -> DataLoader[Batch]:
            position = (epoch * steps + start, (epoch + 1) * steps, rank, world)
            batches = IndexedBatches(sources, schedule, self.seed, *position)
            if in_windows:
                behind = 2 * self.num_workers  # each worker prepares two batches ahead
                batches = WindowedBatches(sources, schedule, self.seed, *position, windows=self.windows, behind=behind)
            return load(examples, batches, self.tokenizer.pad_id, self.num_workers)

        return TrainLoader(steps, open_at, self.position)

    def _stream_loader(self, rank: int, world: int) -> TrainLoader:
        workers = min(usable_workers(source, world, self.num_workers) for source in self.sources)
        per_rank(self.batch_size, world)
        cached = any(shard.cache for source in self.sources for shard in source.shards)
        open_shards = OPEN_SHARDS // 2 if cached else OPEN_SHARDS  # each stays in the cache while it is read
        order = ShardOrder(self.sources, self.seed, rank, world, self.shuffle_buffer, open_shards, self.caption_keys)
        transform, schedule = self._transform(), self.schedule(self.epoch_samples)

        def open_at(epoch: int, start: int) -> DataLoader[Batch]:
            batches = ShardBatches(order, transform, self.tokenizer, schedule, epoch, start, self.max_bad_fraction)
            return DataLoader(batches, batch_size=None, **loading(workers))

        return TrainLoader(self.steps_per_epoch, open_at, self.position)


def usable_workers(source: Source[Shard], world: int, num_workers: int) -> int:
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
