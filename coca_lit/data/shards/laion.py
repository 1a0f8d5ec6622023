"""Pre-training on LAION or any other image-text shards in the format of img2dataset."""

import math
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from coca_lit import extensions
from coca_lit.data.bad_samples import BadSamples
from coca_lit.data.datamodule import CaptionDataModule, LoaderArguments
from coca_lit.data.inputs import IMAGES, chosen_reader, other_endings
from coca_lit.data.loader import ShuffledBatches
from coca_lit.data.mixture import Source, check_weights
from coca_lit.data.records import Record, drawn
from coca_lit.data.shards.index import count_faults, tar_indexes
from coca_lit.data.shards.listing import find_shards
from coca_lit.data.shards.sample import OWN_KINDS
from coca_lit.data.shards.scan import read_shard
from coca_lit.data.shards.shard import MANIFEST, CacheSettings, Shard
from coca_lit.data.shards.training import IndexedShards, SampleStep, StepFactory
from coca_lit.data.sources import TrainTransform
from coca_lit.distributed import print_rank_zero, stable_seed
from coca_lit.errors import DataError, check_number, whole_number

if TYPE_CHECKING:
    from coca_lit.data.shards.selection import Selection
    from coca_lit.data.shards.windows import Windows

Patterns = str | Sequence[str]
AUTO_BYTES = 100 * 10**9  # of shards: what page caches and SSDs still serve in any order


class LAIONDataModule(CaptionDataModule):
    """Endless passes over the shards, cut into epochs of `epoch_samples`; there is no validation set.

    Local shards of up to `AUTO_BYTES` are shuffled as a whole, others in windows, see `coca_lit.data.shards.windows`.

    Args:
        shards: "FOLDER/{00000..00099}.tar", "FOLDER/*.tar", "s3://BUCKET/FOLDER", "hf://datasets/ORG/NAME/*.tar" or a
            list of these; for a mixture {name: the same}. A data set on the Hub is read at the commit that its revision
            (NAME@REVISION, else main) has when the run starts, also after a resume.
        epoch_samples: of all processes together; need not be one pass over the shards. None takes the number of
            samples in the shards.
        weights: {name: share} of a mixture, held throughout training. None makes them proportional to the number of
            samples.
        selection: file of the samples to read, see `coca_lit.data.shards.selection`; for a mixture {name: file}, where
            sets without one are read whole. None reads all.
        caption_keys: "txt", or a field of each sample's JSON; for several {key: probability}, one of which is drawn
            for each sample in every pass.
        window, window_gb: size of a shuffled window in samples and in GB of shards; the smaller limit applies.
        readers: logical readers of windows, each with its own shards; reduced to a divisor of `batch_size`.
        max_bad_fraction: share of broken samples, or of torn or empty shards, above which training stops.
        cache_dir, cache_gb: folder and size of the cache of remote shards, shared by the processes of a machine.
        store_patience: seconds that an object store may be unreachable before the run stops, see
            `coca_lit.data.shards.remote.store`.
        further: see `CaptionDataModule`; an option of another kind of input than images, which is then read in place
            of images; or what the sample step of a project is made from, None for no step.
    """

    def __init__(
        self,
        shards: Patterns | Mapping[str, Patterns],
        epoch_samples: int | None,
        weights: Mapping[str, float] | None = None,
        selection: str | Mapping[str, str] | None = None,
        caption_keys: str | Mapping[str, float] = "txt",
        window: int = 262_144,
        window_gb: float = 10,
        readers: int = 16,
        max_bad_fraction: float = 0.05,
        cache_dir: str = "~/.cache/coca_lit/shards",
        cache_gb: float = 100,
        store_patience: float = 600.0,
        **further: Annotated[
            Any, LoaderArguments, extensions.BATCH_SIZES, extensions.INPUT_OPTIONS, extensions.SAMPLE_STEPS
        ],
    ) -> None:
        options = {name: further.pop(name) for name in extensions.input_options() if name in further}
        self.reader = chosen_reader(options)
        steps = {name: further.pop(name) for name in extensions.sample_steps() if name in further}
        self.sample_steps = {name: value for name, value in steps.items() if value is not None}
        super().__init__(**further)
        check_number("window_gb", window_gb, above=0)
        check_number("cache_gb", cache_gb, above=0)
        check_number("store_patience", store_patience, at_least=0)
        if epoch_samples is not None:
            epoch_samples = whole_number("epoch_samples", epoch_samples, at_least=1)
        if len(self.sample_steps) > 1:
            names = " and ".join(self.sample_steps)
            raise ValueError(f"{names} each make the image to train on: leave one of them out")
        if self.sample_steps and self.reader is not IMAGES:
            name = next(iter(self.sample_steps))
            given = ", ".join(options)
            raise ValueError(f"{name} reads images and no {self.reader.kind}s: leave out {given}, or {name}")
        BadSamples(max_bad_fraction)  # checks the number here rather than in a worker
        keys = {caption_keys: 1.0} if isinstance(caption_keys, str) else caption_keys
        self.caption_keys = check_weights("caption_keys", keys)
        self.patterns = dict(shards) if isinstance(shards, Mapping) else {"": shards}
        self.weights = None if weights is None else check_weights("weights", weights)
        if self.weights is not None and self.weights.keys() != self.patterns.keys():
            raise ValueError(f"shards and weights must have the same names, not {[*self.patterns]}, {[*self.weights]}")
        self.selections: dict[str, str] = {}
        if isinstance(selection, Mapping):
            self.selections = dict(selection)
        elif selection:
            self.selections = {"": selection}
        unknown = sorted(self.selections.keys() - self.patterns.keys())
        if unknown:
            raise ValueError(f"a selection belongs to a set of shards: got {unknown[0]!r}, not of {[*self.patterns]}")
        self._epoch_samples = epoch_samples
        self.max_bad_fraction = max_bad_fraction
        self.window = whole_number("window", window, at_least=1)
        self.window_bytes = window_gb * 1e9
        self.readers = math.gcd(whole_number("readers", readers, at_least=1), self.batch_size)
        self.commits: dict[str, str] = {}  # at which data sets on the Hub are read, by "ORG/NAME@REVISION"
        self.cache = CacheSettings(Path(cache_dir).expanduser(), int(cache_gb * 1e9), store_patience)

    def training_captions(self) -> dict[str, tuple[str, ...]]:
        raise DataError(
            "shards do not list all captions, which `vocabulary` needs, and some objectives: train on records"
        )

    def drawn_records(self, count: int) -> list[Record]:
        """The first samples of a few local shards; of remote ones, of the shard that the training reads first, which
        then is in the cache.
        """
        _ = self.windows  # which refuses what cannot be read
        shards = self._all_shards
        if any(shard.is_remote for shard in shards):
            indexes = [index for source in self.sources for index in source.shards]
            first = self.indices_from(0, 0).part(0)[0].i
            shards = [indexes[bisect_right([*accumulate(map(len, indexes))], first)].shard]
        else:
            shards = drawn(shards, 8)
        records: list[Record] = []
        for shard in shards:
            with suppress(DataError):  # the training counts those
                of_shard = read_shard(shard, self.caption_keys, BadSamples(1.0), [self.reader])
                records += islice(of_shard, math.ceil(count / len(shards)))
        return records

    @cached_property
    def shards(self) -> dict[str, list[Shard]]:
        """By the name of their source; shards of which nothing is selected are left out."""
        found = {name: find_shards(patterns, self.cache, self.commits) for name, patterns in self.patterns.items()}
        return found | {name: chosen.of(found[name]) for name, chosen in self.chosen.items()}

    @property
    def _all_shards(self) -> list[Shard]:
        return [shard for of_source in self.shards.values() for shard in of_source]

    @cached_property
    def chosen(self) -> "dict[str, Selection]":
        """The selections, by the name of their source."""
        if not self.selections:
            return {}
        from coca_lit.data.shards.selection import read_selection

        return {name: read_selection(Path(path)) for name, path in self.selections.items()}

    @cached_property
    def windows(self) -> "Windows | None":
        """In which samples are shuffled; None for all at once."""
        shards = self._all_shards
        packed = next((shard.name for shard in shards if not shard.name.endswith(".tar")), None)
        if packed:
            raise DataError(f"{packed} is not an uncompressed .tar: unpack it (gunzip)")
        remote = [shard.stamp().bytes for shard in shards if shard.is_remote]
        if not remote and sum(os.path.getsize(shard.name) for shard in shards) <= AUTO_BYTES:
            return None
        from coca_lit.data.shards.windows import Windows

        windows = Windows(self.window, self.window_bytes, self.readers)
        needed = windows.cache_bytes(max(remote, default=0), len(self.shards))
        behind = self._behind * self.largest_batch
        counted = [(s.stamp().bytes / s.samples, s.samples) for s in shards if s.is_remote and s.samples]
        for each, samples in sorted(counted, reverse=True):  # at worst they are those with the largest samples
            needed += each * min(behind, samples)
            behind = max(0, behind - samples)
        needed = min(sum(remote), needed)
        if needed > self.cache.max_bytes:
            sizes = f"{needed / 1e9:.3g} GB, not of {self.cache.max_bytes / 1e9:.3g} GB"
            raise DataError(f"these windows need a cache of {sizes}: raise data.cache_gb, or lower data.window_gb")
        return windows

    @property
    def _behind(self) -> int:
        """Batches that workers may still have to read when a later one is asked for: each prepares two ahead."""
        return 2 * self.num_workers

    @cached_property
    def sources(self) -> list[Source]:
        """Weighted by their numbers of samples, if nothing else is said; raises `DataError` when too much is missing in
        the shards.
        """
        _ = self.windows  # first, as it refuses what cannot be read
        found = tar_indexes(self._all_shards, self.cache.folder / "indexes")
        bad = BadSamples(self.max_bad_fraction)
        count_faults(self._all_shards, found, bad)
        bad.end_of_pass()
        has_images = any(index.places[:, 0].any() for index in found)
        has_others = any(index.places[:, len(OWN_KINDS) :].any() for index in found)
        if has_others and not has_images and self.reader is IMAGES:
            keys = " or ".join(f"data.{name}" for name in extensions.input_options())
            raise DataError(f"the shards hold other files ({', '.join(other_endings())}) and no images: set {keys}")
        rest = iter(found)
        by_name = {name: [*islice(rest, len(shards))] for name, shards in self.shards.items()}
        sources = [Source(name, sum(map(len, indexes)), shards=indexes) for name, indexes in by_name.items()]
        empty = [source.name for source in sources if not source.samples]
        if empty:
            raise DataError(f"the shards of {empty[0]!r} hold no samples: check them, or leave them out of the mixture")
        if self.weights is not None:
            weights = self.weights
        elif len(sources) == 1:
            weights = {sources[0].name: 1.0}
        else:
            weights = {source.name: float(source.samples) for source in sources}
        return [source._replace(weight=weights[source.name]) for source in sources]

    @property
    def epoch_samples(self) -> int:
        if self._epoch_samples is not None:
            return self._epoch_samples
        return sum(source.samples for source in self.sources)

    @property
    def steps_per_epoch(self) -> int:
        if self.epoch_samples < self.batch_size:
            raise DataError(f"epoch_samples {self.epoch_samples} is less than one batch of {self.batch_size}")
        return len(self.schedule(self.epoch_samples))

    def prepare_data(self) -> None:
        _ = self.sources
        super().prepare_data()

    def setup(self, stage: str) -> None:
        """All processes read the commits that the first one found."""
        if self.trainer and "hf://" in str(self.patterns):
            self._read_at(self.trainer.strategy.broadcast(self.commits))

    def state_dict(self) -> dict[str, Any]:
        digests = {name: chosen.digest for name, chosen in self.chosen.items()}
        state = {"commits": self.commits, "selections": digests, "found": self._found(), "stamps": self._stamps}
        return super().state_dict() | {name: value for name, value in state.items() if value}

    def _found(self) -> dict[str, list[int]]:
        """The numbers of shards and of samples in them, by the name of their source."""
        return {source.name: [len(source.shards), source.samples] for source in self.sources}

    @cached_property
    def _stamps(self) -> dict[str, int]:
        """By the name of their source, a digest of the sizes of its shards, and of their times or what is recorded of
        them: in a manifest, or by the store.
        """
        found: dict[str, int] = {}
        for source in self.sources:
            states: list[str | int] = []
            for index in source.shards:
                states += [index.shard.file_name, index.stamp.bytes, index.stamp.content or index.stamp.changed_at]
            found[source.name] = stable_seed(*states)
        return found

    def changed_since(self, state: Mapping[str, Any]) -> str:
        """Notes shards of other sizes or times, which copies have, too, and returns what is another training."""
        now = self._found()
        for name, before in state.get("found", now).items():
            if now.get(name) != before:
                of = f" of {name!r}" if name else ""
                shards, samples = before
                shards_now, samples_now = now.get(name, (0, 0))
                began = f"the run began with {shards} shards and {samples} samples{of}"
                return f"{began}, and now there are {shards_now} shards and {samples_now} samples"
        for name, digest in state.get("stamps", self._stamps).items():
            if self._stamps.get(name) != digest:
                of = f" of {name!r}" if name else ""
                print_rank_zero(
                    f"note: shards{of} have another size or time than when the run began; a {MANIFEST} tells a change "
                    "from a copy"
                )
        return super().changed_since(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises `DataError` if a selection is not the one that the run began with."""
        for name, digest in state_dict.get("selections", {}).items():
            if name in self.chosen and self.chosen[name].digest != digest:
                raise DataError(f"{self.selections[name]} is not the selection that the run began with: restore it")
        self._read_at(state_dict.get("commits", self.commits))

    def _read_at(self, commits: dict[str, str]) -> None:
        if commits != self.commits:
            self.commits = commits
            for name in ("shards", "windows", "sources", "_stamps"):  # what was listed before
                self.__dict__.pop(name, None)

    def training_examples(self) -> IndexedShards:
        transform = self.train_transform()
        return IndexedShards(
            self.sources,
            transform,
            self.tokenizer,
            self.caption_keys,
            self.seed,
            self.max_bad_fraction,
            within_shard=self.windows is not None,
            step=self._sample_step(transform),
            captions=self.captions,
            reader=self.reader,
        )

    def _sample_step(self, transform: TrainTransform) -> SampleStep | None:
        """The step that a project takes with each sample; None for none."""
        if not self.sample_steps:
            return None
        ((name, value),) = self.sample_steps.items()
        make_step: StepFactory = extensions.load(extensions.sample_steps()[name].step)
        return make_step(value, transform, [index for source in self.sources for index in source.shards])

    def indices_from(self, epoch: int, start: int) -> ShuffledBatches:
        steps = self.steps_per_epoch
        schedule = self.schedule(self.epoch_samples)
        position = (epoch * steps + start, (epoch + 1) * steps, *self.rank_and_world())
        if self.windows is None:
            return ShuffledBatches(self.sources, schedule, self.seed, *position)
        from coca_lit.data.shards.windows import WindowedBatches

        return WindowedBatches(self.sources, schedule, self.seed, *position, windows=self.windows, behind=self._behind)
