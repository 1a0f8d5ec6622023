"""The clips of shards as records, for evaluations. They are read from their shards when they are needed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from PIL import Image

from coca_lit.data.bad_samples import BadSampleError, BadSamples
from coca_lit.data.records import Record
from coca_lit.data.shards.index import TarIndex, count_faults, tar_indexes
from coca_lit.data.shards.listing import find_shards
from coca_lit.data.shards.sample import image_of, pair_of
from coca_lit.data.shards.shard import CacheSettings
from coca_lit.errors import DataError
from coca_lit.projects.video.clips import Clip, ClipReader, EncodedClip


@dataclass(frozen=True, eq=False)
class StoredClip(Clip):
    """A clip in a shard."""

    index: TarIndex
    row: int
    count: int

    def frames(self, count: int | None = None) -> Iterator[Image.Image]:
        name = f"{self.index.key(self.row)} in {self.index.shard.name}"
        try:
            content = image_of(self.index.read(self.row, ClipReader.suffixes), ClipReader.suffixes)
        except BadSampleError as error:
            raise DataError(f"{name} cannot be read: {error.sample.reason}") from error
        return EncodedClip(content, name, self.count).frames(count)


def clip_shard_records(
    shards: str | Sequence[str], frames: int, caption_keys: Sequence[str] = ("txt",), max_bad_fraction: float = 0.05
) -> list[Record]:
    """The samples of uncompressed shards that have a clip and a caption; other arguments as of `LAIONDataModule`.

    Args:
        frames: of each clip that a model gets.

    Raises:
        DataError: too many samples lack one, too many clips cannot be decoded, or too much of the shards is damaged.
    """
    reader, records = ClipReader(frames), list[Record]()
    cache, bad = CacheSettings(), BadSamples(max_bad_fraction)
    found = find_shards(shards, cache)
    indexes = tar_indexes(found, cache.folder / "indexes")
    count_faults(found, indexes, bad)
    alike = len({shard.file_name for shard in found}) < len(found)  # shards of two folders
    for index in indexes:
        for row in range(len(index)):
            try:
                fields = index.read(row, reader.suffixes)
                clip, captions = pair_of(fields, caption_keys, index.shard.name, reader)
                next(EncodedClip(clip, index.key(row), 1).frames())  # else it would end the evaluation later
            except BadSampleError as error:
                bad.catch(error)
            except DataError as error:
                if isinstance(error.__cause__, ImportError):  # of the package that decodes clips
                    raise
                bad.add("unreadable clip", index.shard.name, index.key(row), str(error))
            else:
                shard = index.shard.name if alike else index.shard.file_name
                records.append(
                    Record(f"{shard}/{index.key(row)}", StoredClip(index, row, frames), chain(*captions.values()))
                )
    bad.end_of_pass()
    return records
