"""What a user named to be captioned, as units of work: a batch of files, or a shard.

A unit is captioned by one process, in batches that depend on nothing else: the captions are the same on any number of
processes, and when the work goes on after it was killed.
"""

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand

from coca_lit.data.shards.listing import local_shards
from coca_lit.errors import DataError
from coca_lit.inference.images import SUFFIXES, Source, find_files, find_images
from coca_lit.inference.shards import Sample, scan_shard

SHARD = ".tar"
EXPECTED = f"expected images ({', '.join(SUFFIXES)}), folders, or shards ({SHARD})"


class Files(NamedTuple):
    """Some image files."""

    sources: list[Source]


class Shard(NamedTuple):
    """A tar of samples. What is in it is not known before it is opened."""

    path: Path

    def open(self) -> "OpenShard":
        samples, problem = scan_shard(self.path)
        return OpenShard(self.path, samples, problem)


class OpenShard(NamedTuple):
    """The samples of a shard."""

    path: Path
    samples: list[Sample]
    problem: str  # what is wrong with the tar, or ""

    @property
    def sources(self) -> list[Source]:
        places = [(sample, sample.image) for sample in self.samples]
        return [Source(f"{self.path}/{sample.key}", self.path, *place) for sample, place in places if place]


Unit = Files | Shard


def find_inputs(words: Sequence[str], batch_size: int) -> list[Unit]:
    """Units of the files, folders and shards that `words` name, each file once, in the order given.

    Args:
        words: paths, globs, and ranges like {00000..00099}.tar. A folder stands for the images in it and its
            subfolders, or if it has none for its shards.

    Raises:
        DataError: a word names nothing, or something else.
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, not {batch_size}")
    paths = dict.fromkeys(path for word in words for path in _paths(word))
    if not paths:
        raise DataError(f"nothing to caption: {EXPECTED}")
    files = [Source(str(path), path) for path in paths if not _is_shard(path)]
    batches = [Files(files[start : start + batch_size]) for start in range(0, len(files), batch_size)]
    return [*batches, *(Shard(path) for path in paths if _is_shard(path))]


def _paths(word: str) -> Iterator[Path]:
    path = Path(word)
    if path.is_dir():
        found = find_images(path) or find_files(path, (SHARD,))
        if not found:
            raise DataError(f"no image and no shard in '{word}' (looked for {', '.join(SUFFIXES)}, {SHARD})")
        yield from found
    elif path.is_file():
        if path.suffix.lower() not in (*SUFFIXES, SHARD):
            raise DataError(f"'{word}' has the unknown suffix '{path.suffix}': {EXPECTED}")
        yield path
    elif word.endswith(SHARD):
        yield from _find_shards(word)
    else:
        matches = _matches(word)
        if not matches:
            raise DataError(f"there is no '{word}': {EXPECTED}")
        for match in matches:
            yield from _paths(match)


def _find_shards(pattern: str) -> list[Path]:
    try:
        return local_shards(pattern)
    except ValueError as error:  # a brace without its partner
        raise DataError(f"'{pattern}' is not a range of shards like {{00000..00099}}.tar: {error}") from error


def _matches(pattern: str) -> list[str]:
    try:
        return [name for part in braceexpand(pattern) for name in sorted(glob.glob(part))]
    except ValueError:  # a brace without its partner
        return []


def _is_shard(path: Path) -> bool:
    return path.suffix.lower() == SHARD
