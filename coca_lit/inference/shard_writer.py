"""Captions as new shards, for training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coca_lit.distributed import rank
from coca_lit.errors import DataError
from coca_lit.files import remove_leftovers
from coca_lit.inference.images import Source
from coca_lit.inference.inputs import OpenShard, Shard, Unit
from coca_lit.inference.shards import write_shard
from coca_lit.inference.writer import SETTINGS, Captions, Writer, claim


class Recaptioned(Writer):
    """A folder of shards, each a copy of an input with the new captions, see `coca_lit.inference.shards`.

    A shard is there whole or not at all; one that is there is done.
    """

    def __init__(self, folder: Path, units: Sequence[Unit], settings: dict[str, Any]) -> None:
        shards = [unit.path for unit in units if isinstance(unit, Shard)]
        if len(shards) < len(units):
            raise DataError(f"{folder} would hold shards, which are made from shards: for files give output=NAME.jsonl")
        names: dict[str, Path] = {}
        for path in shards:
            if names.setdefault(path.name, path) != path:
                raise DataError(f"{names[path.name]} and {path} would both become {folder / path.name}")
            if path.resolve() == (folder / path.name).resolve():
                raise DataError(f"{path} would replace itself: choose another folder as output")
        if rank() == 0:
            remove_leftovers(folder)
        claim(folder / SETTINGS, folder.exists() and any(folder.iterdir()), settings)
        self.folder = folder
        self.captions: dict[str, Captions] = {}  # of the shard in work, by the name of the image

    def has_unit(self, unit: Unit) -> bool:
        return isinstance(unit, Shard) and (self.folder / unit.path.name).exists()

    def write(self, captions: Mapping[Source, Captions]) -> None:
        self.captions |= {source.name: found for source, found in captions.items()}

    def end_shard(self, shard: OpenShard) -> None:
        keys = {sample.key: f"{shard.path}/{sample.key}" for sample in shard.samples}
        captions = {key: self.captions[name] for key, name in keys.items() if name in self.captions}
        write_shard(shard.path, self.folder / shard.path.name, shard.samples, captions)
        self.captions = {}
