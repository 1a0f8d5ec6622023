"""Captions as lines of JSON, and as a COCO results file that is put together from such lines."""

import glob
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coca_lit.apply.images import Source
from coca_lit.apply.inputs import Files, Unit
from coca_lit.apply.journal import append, parts, read_lines, repair
from coca_lit.apply.writer import SETTINGS, Captions, Writer, all_sources, claim
from coca_lit.data.annotations import load_json
from coca_lit.data.files import remove_leftovers, replacing
from coca_lit.data.records import DataError
from coca_lit.distributed import gather_objects, rank


class JsonLines(Writer):
    """A line {"path": …, "caption": …} for each image; with several captions also "captions", all of them.

    Rank 0 appends to the file, any other rank to a part of its own beside it; at the end rank 0 brings all lines into
    the order of the inputs. A line that was cut off when a process was killed is removed.
    """

    key = "path"

    def __init__(self, path: Path, units: Sequence[Unit], settings: dict[str, Any]) -> None:
        if rank() == 0:
            remove_leftovers(path.parent, glob.escape(path.name))
        claim(path.with_name(f"{path.name}.{SETTINGS}"), path.exists(), settings)
        self.path, self.units = path, units
        self.journal = self._journal()
        repair(self.journal)
        self.done = set(self._rows())

    def has(self, source: Source) -> bool:
        return self._id(source) in self.done

    def write(self, captions: Mapping[Source, Captions]) -> None:
        rows = [{self.key: self._id(source), **self._texts(found)} for source, found in captions.items()]
        append(self.journal, rows)
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
        lines = [row for file in (self.path, *parts(self.path)) for row in read_lines(file, self.key)]
        return {row[self.key]: row for row in lines}

    def _save(self, rows: list[dict[str, Any]]) -> None:
        content = "".join(f"{json.dumps(row)}\n" for row in rows)
        if not self.path.exists() or self.path.read_text() != content:
            with replacing(self.path) as temporary:
                temporary.write_text(content)

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
        rows += [row for file in parts(self.path) for row in read_lines(file, self.key)]
        return {row[self.key]: row for row in rows}

    def _save(self, rows: list[dict[str, Any]]) -> None:
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(rows, indent=0) + "\n")

    def _id(self, source: Source) -> int | str:
        stem = Path(source.name).stem
        number = re.fullmatch(r"(?:COCO_\w+_)?(\d+)", stem, re.ASCII)
        return int(number[1]) if number else stem

    def _texts(self, captions: Captions) -> dict[str, Any]:
        return {"caption": captions[0]}
