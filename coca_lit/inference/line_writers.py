"""Captions as lines of JSON, and as a COCO results file that is put together from such lines."""

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from coca_lit.data.datasets.annotations import load_json
from coca_lit.distributed import gather_objects, rank
from coca_lit.errors import DataError
from coca_lit.files import append_lines, atomic_write, remove_leftovers, whole_lines
from coca_lit.inference.images import Source
from coca_lit.inference.inputs import Files, Unit
from coca_lit.inference.writer import SETTINGS, Captions, Writer, all_sources, claim


class JsonLines(Writer):
    """A line {"path": …, "caption": …} for each image; with several captions also "captions", all of them.

    Rank 0 appends to the file, any other rank to a part of its own beside it; at the end rank 0 brings all lines into
    the order of the inputs.
    """

    key = "path"

    def __init__(self, path: Path, units: Sequence[Unit], settings: dict[str, Any]) -> None:
        if rank() == 0:
            remove_leftovers(path.parent, glob.escape(path.name))
        claim(path.with_name(f"{path.name}.{SETTINGS}"), path.exists(), settings)
        self.path, self.units = path, units
        self.journal = self._journal()
        self.done = set(self._rows())

    def has(self, source: Source) -> bool:
        return self._id(source) in self.done

    def write(self, captions: Mapping[Source, Captions]) -> None:
        rows = [{self.key: self._id(source), **self._texts(found)} for source, found in captions.items()]
        append_lines(self.journal, map(json.dumps, rows))
        self.done.update(row[self.key] for row in rows)

    def finish(self) -> None:
        gather_objects(None)  # waits until every process has written
        if rank() == 0:
            rows = self._rows()
            names = dict.fromkeys(self._id(source) for source in all_sources(self.units))
            others = [name for name in rows if name not in names]  # of earlier inputs
            self._save([rows[name] for name in [*others, *names] if name in rows])
            for part in parts(self.path):
                part.unlink()

    def _journal(self) -> Path:
        return self.path if rank() == 0 else self.path.with_name(f"{self.path.name}.rank{rank()}")

    def _rows(self) -> dict[Any, dict[str, Any]]:
        """All rows that any process has written, by their key."""
        lines = [row for file in (self.path, *parts(self.path)) for row in read_rows(file, self.key)]
        return {row[self.key]: row for row in lines}

    def _save(self, rows: list[dict[str, Any]]) -> None:
        content = "".join(f"{json.dumps(row)}\n" for row in rows)
        if not self.path.exists() or self.path.read_text() != content:
            atomic_write(self.path, content.encode())

    def _id(self, source: Source) -> Any:
        return source.name

    def _texts(self, captions: Captions) -> dict[str, Any]:
        return {"caption": captions[0]} | ({"captions": list(captions)} if len(captions) > 1 else {})


class CocoResults(JsonLines):
    """The results format of COCO, [{"image_id": …, "caption": …}], as COCO's own evaluation and `coca-score` read it.

    The id of an image is the number in names like 000000000042.jpg and COCO_val2014_000000000042.jpg, else the file
    name without its suffix. Until the end the captions are in parts beside the file.
    """

    key = "image_id"

    def __init__(self, path: Path, units: Sequence[Unit], settings: dict[str, Any]) -> None:
        owners: dict[int | str, str] = {}
        for source in (source for unit in units if isinstance(unit, Files) for source in unit.sources):
            other = owners.setdefault(self._id(source), source.name)
            if other != source.name:
                raise DataError(f"{other} and {source.name} have the same image id: write .jsonl, which has paths")
        super().__init__(path, units, settings)

    def _journal(self) -> Path:
        return self.path.with_name(f"{self.path.name}.rank{rank()}")

    def _rows(self) -> dict[Any, dict[str, Any]]:
        rows = load_json(self.path) if self.path.exists() else []
        rows += [row for file in parts(self.path) for row in read_rows(file, self.key)]
        return {row[self.key]: row for row in rows}

    def _save(self, rows: list[dict[str, Any]]) -> None:
        atomic_write(self.path, f"{json.dumps(rows, indent=0)}\n".encode())

    def _id(self, source: Source) -> int | str:
        stem = Path(source.name).stem
        number = re.fullmatch(r"(?:COCO_\w+_)?(\d+)", stem, re.ASCII)
        return int(number[1]) if number else stem

    def _texts(self, captions: Captions) -> dict[str, Any]:
        return {"caption": captions[0]}


def parts(path: Path) -> list[Path]:
    """The parts of a file that processes have left beside it."""
    found = (other for other in path.parent.iterdir() if other.name.startswith(f"{path.name}.rank"))
    return sorted(other for other in found if other.name.removeprefix(f"{path.name}.rank").isdigit())


def read_rows(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """The rows of the finished lines of a file, none if it is not there.

    Raises:
        DataError: a line is no JSON object with `key`.
    """
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            row = json.loads(line)
            row[key]
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(f'line {number} of {path} is not an object with a "{key}": repair or remove it') from error
        yield row
