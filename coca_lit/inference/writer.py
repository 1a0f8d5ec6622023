"""Where captions go: what every writer does. It knows what is written already, so that work that was killed goes on.

Beside a result lies settings.json: the model and the options that it was made with. A result is continued with the same
ones only, and a file or folder that has none is never touched.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from coca_lit.data.datasets.annotations import load_json
from coca_lit.distributed import broadcast_object, gather_objects, rank, world_size
from coca_lit.errors import DataError
from coca_lit.files import atomic_write
from coca_lit.inference.images import Source
from coca_lit.inference.inputs import Files, OpenShard, Unit
from coca_lit.inference.rows import print_rows

SETTINGS = "settings.json"
Captions = Sequence[str]  # of one image, the best first


class Writer(ABC):
    """Takes the captions of this process, batch by batch."""

    def has_unit(self, unit: Unit) -> bool:
        """Whether all of a unit is written already."""
        return False

    def has(self, source: Source) -> bool:
        """Whether the captions of an image are written already."""
        return False

    @abstractmethod
    def write(self, captions: Mapping[Source, Captions]) -> None:
        """Adds the captions of images that are not written yet."""

    def end_shard(self, shard: OpenShard) -> None:
        """All of a shard was handed over."""
        return

    def finish(self) -> None:
        """All of this process was handed over; returns when the result is complete."""
        return


class Printer(Writer):
    """Lines of path, tab and caption on standard output, one for each caption, in the order of the inputs."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units
        self.kept: dict[Source, Captions] = {}

    def write(self, captions: Mapping[Source, Captions]) -> None:
        if world_size() == 1:
            self._print(captions)
        else:  # lines of several processes would mix
            self.kept |= captions

    def finish(self) -> None:
        gathered = {source: found for part in gather_objects(self.kept) for source, found in part.items()}
        if rank() == 0 and gathered:
            self._print({source: gathered[source] for source in all_sources(self.units) if source in gathered})

    def _print(self, captions: Mapping[Source, Captions]) -> None:
        print_rows([(source.name, caption) for source, found in captions.items() for caption in found])


def claim(file: Path, taken: bool, settings: dict[str, Any]) -> None:
    """Notes in `file` that an output is made with `settings`; raises `DataError` on every process if it is not so.

    Args:
        taken: something is there already.
    """
    problem = None
    if rank() == 0:
        try:
            _claim(file, taken, settings)
        except DataError as error:
            problem = str(error)
    if problem := broadcast_object(problem):
        raise DataError(problem)


def _claim(file: Path, taken: bool, settings: dict[str, Any]) -> None:
    if file.exists():
        known = load_json(file)
        for key in {**settings, **known}:
            was, now = known.get(key), settings.get(key)
            if was != now:
                raise DataError(f"{file} says {key}={was}, but now it is {now}: choose another output")
    elif taken:
        raise DataError(f"the output exists and coca-caption did not write it ({file} is missing): choose another")
    else:
        atomic_write(file, (json.dumps(settings, indent=2) + "\n").encode())


def all_sources(units: Sequence[Unit]) -> Iterator[Source]:
    """The images of the units, in order. Looks into every shard."""
    for unit in units:
        yield from unit.sources if isinstance(unit, Files) else unit.open().sources
