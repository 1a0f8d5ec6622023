"""Where captions go: standard output, JSON lines, a COCO results file, or new shards.

A writer knows what is written already, so that interrupted work resumes. Beside a result lies settings.json, the model
and the options that made it: a result is continued with the same ones only, and nothing is written to or removed from a
file or folder without it.
"""

import glob
import json
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from coca_lit.data.datasets.annotations import MAX_BYTES, check_id
from coca_lit.distributed import broadcast_object, gather_objects, rank, world_size
from coca_lit.errors import DataError
from coca_lit.files import (
    OLD,
    append_lines,
    atomic_write,
    is_leftover,
    remove_leftovers,
    state_of,
    whole_lines,
    write_json,
)
from coca_lit.reading import is_int64, parse_json, printable, read_json
from coca_lit.tools.caption.inputs import OpenShard, Source, Unit, open_shard, write_shard
from coca_lit.tools.claims import claim, is_of_another

SETTINGS = "settings.json"
Captions = Sequence[str]  # of one image, the best first
_NO_BYTES = re.compile("[^\udca0-\udcff]+")  # these stand for bytes that are not UTF-8; those below for C1 controls


class Writer(ABC):
    """Takes the captions of this process, batch by batch."""

    def has_unit(self, unit: Unit) -> bool:
        """Whether a whole unit is written already."""
        return False

    def has(self, source: Source) -> bool:
        """Whether the captions of an image are written already."""
        return False

    @abstractmethod
    def write(self, captions: Mapping[Source, Captions]) -> None:
        """Adds the captions of images that are not written yet."""

    def end_shard(self, shard: OpenShard) -> None:
        """Called after the last batch of a shard."""
        return

    def finish(self) -> None:
        """Called after the last batch of this process; returns when the result of all processes is complete."""
        return


def open_writer(output: str | None, units: Sequence[Unit], settings: dict[str, Any]) -> Writer:
    """The writer for `output`: None, NAME.jsonl, NAME.json or a folder.

    Raises:
        DataError: another suffix, or the output cannot be written or continued.
    """
    if output is None:
        return Printer(units)
    path = Path(output)
    if path.suffix == ".jsonl":
        return JsonLines(path, units, settings)
    if path.suffix == ".json":
        if settings.get("generate.num_captions", 1) > 1:
            raise DataError("a COCO results file holds one caption for each image: write .jsonl for several")
        return CocoResults(path, units, settings)
    if path.is_file() or (path.suffix and not path.is_dir() and not output.endswith("/")):
        raise DataError(f"unknown suffix '{path.suffix}' of output={output}: expected .jsonl, .json, or a folder/")
    writer = Recaptioned(path, units)
    _claim(path / SETTINGS, path.exists() and not all(map(is_leftover, path.iterdir())), settings, "*", OLD)
    return writer


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
            self._print({source: gathered[source] for source in _all_sources(self.units) if source in gathered})

    def _print(self, captions: Mapping[Source, Captions]) -> None:
        print_rows([(source.name, caption) for source, found in captions.items() for caption in found])


class JsonLines(Writer):
    """A line {"path": …, "caption": …, "file": [size, time of change]} for each image; with several captions also
    "captions", all of them. An image that was replaced under its name is captioned again.

    Rank 0 appends to the file, every other rank to a part of its own beside it; in the end rank 0 merges all lines in
    the order of the inputs.
    """

    key = "path"

    def __init__(self, path: Path, units: Sequence[Unit], settings: dict[str, Any]) -> None:
        self.path = path
        self.units = units
        taken = path.exists() or (path.parent.is_dir() and bool(self._parts()))
        _claim(path.with_name(f"{path.name}.{SETTINGS}"), taken, settings, glob.escape(path.name))
        self.journal = self._journal()
        self.done = {key: row.get("file") for key, row in self._rows().items()}

    def has(self, source: Source) -> bool:
        known = self.done.get(self._id(source), ())
        return known is None or known == list(source.state)  # None: a row that somebody has written

    def write(self, captions: Mapping[Source, Captions]) -> None:
        rows = []
        for source, found in captions.items():
            texts = {"caption": found[0]} | ({"captions": list(found)} if len(found) > 1 else {})
            rows.append({self.key: self._id(source), **texts, **self._origin(source), "file": source.state})
        append_lines(self.journal, map(json.dumps, rows))
        self.done |= {row[self.key]: row["file"] for row in rows}

    def finish(self) -> None:
        gather_objects(None)  # waits until every process has written
        if rank() == 0:
            names = {self._id(source): list(source.state) for source in _all_sources(self.units)}
            rows = self._rows(names)
            for name in names.keys() & rows.keys():  # of a file that was there before, and that cannot be decoded now
                if names[name] and rows[name].get("file") not in (None, names[name]):
                    del rows[name]
            others = [name for name in rows if name not in names]  # of earlier inputs
            self._save([rows[name] for name in [*others, *names] if name in rows])
            for part in self._parts():
                part.unlink()

    def _journal(self) -> Path:
        return self.path if rank() == 0 else self.path.with_name(f"{self.path.name}.rank{rank()}")

    def _parts(self) -> list[Path]:
        """The parts that processes have left beside the file."""
        prefix = f"{self.path.name}.rank"
        found = (other for other in self.path.parent.iterdir() if other.name.startswith(prefix))
        return sorted(other for other in found if other.name.removeprefix(prefix).isdigit())

    def _rows(self, states: Mapping[Any, list[int]] = MappingProxyType({})) -> dict[Any, dict[str, Any]]:
        """All rows that any process has written, by their key: of several that of the file with this state."""
        rows: dict[Any, dict[str, Any]] = {}
        for row in [*self._saved(), *(row for part in self._parts() for row in _read_rows(part, self.key))]:
            key = row[self.key]
            if key not in rows or rows[key].get("file") != states.get(key, []):
                rows[key] = row
        return rows

    def _saved(self) -> list[dict[str, Any]]:
        return list(_read_rows(self.path, self.key))

    def _save(self, rows: list[dict[str, Any]]) -> None:
        content = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
        if not self.path.exists() or self.path.read_bytes() != content:
            atomic_write(self.path, content)

    def _id(self, source: Source) -> Any:
        return source.name

    def _origin(self, source: Source) -> dict[str, str]:
        """What the rows say of the file besides."""
        return {}


class CocoResults(JsonLines):
    """The results format of COCO, [{"image_id": …, "caption": …}], as COCO's own evaluation and `coca-score` read it.

    The id of an image is the number, of 64 bits, in names like 000000000042.jpg and COCO_val2014_000000000042.jpg, else
    the file name without its suffix. Captions are in parts beside the file until all are written.
    """

    key = "image_id"

    def __init__(self, path: Path, units: Sequence[Unit], settings: dict[str, Any]) -> None:
        owners: dict[int | str, Source] = {}
        for source in _all_sources(units):
            other = owners.setdefault(self._id(source), source)
            if other.name != source.name:
                raise DataError(f"{other.name} and {source.name} have the same image id: write .jsonl, which has paths")
        super().__init__(path, units, settings)
        for image, row in self._rows().items():
            if image in owners and _is_of_another(row, owners[image].path, owners[image].state):
                raise DataError(
                    f"{path} holds a caption of {row['path']}, which has the same image id as {owners[image].name}: "
                    "choose another output"
                )

    def _journal(self) -> Path:
        return self.path.with_name(f"{self.path.name}.rank{rank()}")

    def _saved(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        rows = read_json(self.path, list, MAX_BYTES, keep_surrogates=True)
        return [_row(row, self.key, f"entry {number} of {self.path}") for number, row in enumerate(rows, start=1)]

    def _save(self, rows: list[dict[str, Any]]) -> None:
        atomic_write(self.path, f"{json.dumps(rows, indent=0)}\n".encode())

    def _id(self, source: Source) -> int | str:
        stem = Path(source.name).stem
        number = re.fullmatch(r"(?:COCO_\w+_)?(\d+)", stem, re.ASCII)
        return int(number[1]) if number and is_int64(int(number[1])) else stem

    def _origin(self, source: Source) -> dict[str, str]:
        return {"path": str(source.path.resolve())}


class Recaptioned(Writer):
    """A folder of shards for training, each a copy of an input with the new captions, see
    `write_shard`.

    A shard is written whole or not at all; an existing one is done if the mark beside it says that it was made of this
    input. `open_writer` claims the folder, once for all processes of an engine.
    """

    def __init__(self, folder: Path, units: Sequence[Unit]) -> None:
        shards = [unit for unit in units if isinstance(unit, Path)]
        if len(shards) < len(units):
            raise DataError(f"{folder} is a folder for shards, but the inputs are files: write output=NAME.jsonl")
        names: dict[str, Path] = {}
        for path in shards:
            if names.setdefault(path.name, path) != path:
                raise DataError(f"{names[path.name]} and {path} would both become {folder / path.name}")
            if path.resolve() == (folder / path.name).resolve():
                raise DataError(f"{path} would replace itself: choose another folder as output")
        self.folder = folder
        for path in shards:
            made = self._made_of(path)
            if made and _is_of_another(made, path, state_of(path)):
                raise DataError(f"{folder / path.name} was made of {made['path']}: choose another output for {path}")
        self.captions: dict[str, Captions] = {}  # of the current shard, by the name of the image

    def has_unit(self, unit: Unit) -> bool:
        if not isinstance(unit, Path) or not (self.folder / unit.name).exists():
            return False
        made = self._made_of(unit)
        return made is not None and made.get("file") == list(state_of(unit))

    def _made_of(self, source: Path) -> dict[str, Any] | None:
        """Of which file the existing shard of this name was made."""
        mark = self._mark(source)
        is_made = mark.exists() and (self.folder / source.name).exists()
        return read_json(mark, dict, keep_surrogates=True) if is_made else None

    def _mark(self, source: Path) -> Path:
        return self.folder / f".{source.name}.source.json"

    def write(self, captions: Mapping[Source, Captions]) -> None:
        self.captions |= {source.name: found for source, found in captions.items()}

    def end_shard(self, shard: OpenShard) -> None:
        keys = {key: f"{shard.path}/{key}" for key in shard.samples}
        captions = {key: self.captions[name] for key, name in keys.items() if name in self.captions}
        write_shard(shard, self.folder / shard.path.name, captions)
        write_json(self._mark(shard.path), {"path": str(shard.path.resolve()), "file": shard.state})
        self.captions = {}


def _is_of_another(made: Mapping[str, Any], path: Path, state: Sequence[int]) -> bool:
    """Whether a result was made of another file than this one, and not of one that has moved here."""
    return made.get("file") != list(state) and is_of_another(str(made.get("path", "")), path)


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of fields, separated by tabs. Tabs, line breaks and other control characters in a field are escaped,
    as `\\x0a`; file names that are not Unicode are printed byte for byte. Exits silently when the reader has closed the
    pipe.
    """
    try:
        for row in rows:
            print("\t".join(_NO_BYTES.sub(lambda part: printable(part[0]), field) for field in row))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, for example `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit()


def _claim(file: Path, taken: bool, settings: dict[str, Any], outputs: str, older: float = 0.0) -> None:
    """`coca_lit.tools.claims.claim`, with the same error on every process; then what killed processes left of
    `outputs`, a pattern of names, is removed, see `remove_leftovers`.
    """
    problem = None
    if rank() == 0:
        try:
            claim(file, settings, taken)
            remove_leftovers(file.parent, outputs, older)
        except DataError as error:
            problem = str(error)
    problem = broadcast_object(problem)
    if problem:
        raise DataError(problem)


def _all_sources(units: Sequence[Unit]) -> Iterator[Source]:
    """The images of the units, in order. Opens every shard."""
    for unit in units:
        yield from unit if isinstance(unit, list) else open_shard(unit).sources


def _read_rows(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """The rows of the complete lines of a file, none if there is no such file.

    Raises:
        DataError: a line is not a JSON object with `key`.
    """
    for number, line in enumerate(whole_lines(path), start=1):
        where = f"line {number} of {path}"
        yield _row(parse_json(line, where, keep_surrogates=True), key, where)


def _row(row: Any, key: str, where: str) -> dict[str, Any]:
    """A row of captions from JSON; raises `DataError` if it cannot be one."""
    try:
        check_id(row[key])
    except (LookupError, TypeError) as error:
        raise DataError(f'{where} is not an object with a "{key}": repair or remove it') from error
    return row
