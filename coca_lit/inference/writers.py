"""The writer that a user asks for by the name of the output."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coca_lit.errors import DataError
from coca_lit.inference.inputs import Unit
from coca_lit.inference.line_writers import CocoResults, JsonLines
from coca_lit.inference.shard_writer import Recaptioned
from coca_lit.inference.writer import Printer, Writer


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
    if path.suffix and not path.is_dir() and not output.endswith("/"):
        known = "expected .jsonl, .json, or a folder for shards"
        raise DataError(f"unknown suffix '{path.suffix}' of output={output}: {known}")
    return Recaptioned(path, units, settings)
