"""Tables of image files and captions: .csv, .tsv and .parquet."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from coca_lit.data.datasets.annotations import MAX_BYTES, read_json_lines
from coca_lit.errors import DataError
from coca_lit.reading import open_parquet, read_bounded

# The usual names of columns, and of fields in JSON, the likeliest first.
IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "filename", "file_name", "path", "file")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "description")


def open_table(path: Path) -> tuple[Sequence[str], Iterable[dict[str, Any]]]:
    """The names of the columns, and the rows; raises `DataError` for a file that is no such table."""
    if path.suffix in (".csv", ".tsv"):
        content = read_bounded(path, MAX_BYTES, "is not a readable table")
        try:
            text = content.decode("utf-8-sig")
            head = text.partition("\n")[0]
            # That of a .csv is a semicolon where the comma separates decimals.
            delimiter = "\t" if path.suffix == ".tsv" else max(",;\t", key=head.count)
            reader = csv.DictReader(StringIO(text, newline=""), delimiter=delimiter)
            return reader.fieldnames or [], list(reader)
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path} is not a readable table: {error}; save it in UTF-8, with quotes closed") from error
    if path.suffix != ".parquet":
        raise DataError(f"{path} is not a .csv, .tsv or .parquet file")
    with open_parquet(path) as table:
        names = table.schema_arrow.names
    return names, _parquet_rows(path)


def read_rows(path: Path) -> Iterable[Any]:
    """The rows of a table, or the values of a .jsonl; raises `DataError` as `open_table`."""
    return read_json_lines(path) if path.suffix == ".jsonl" else open_table(path)[1]


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    with open_parquet(path) as table:
        for batch in table.iter_batches():
            yield from batch.to_pylist()


def column(path: Path, columns: Sequence[str], usual: Sequence[str], how: str, wanted: str | None = None) -> str:
    """The name of a column: the one that is wanted, else the first of the usual names that the table has.

    Args:
        how: the user can name it, for the error.
    """
    known = [name for name in ([wanted] if wanted else usual) if name in columns]
    if not known:
        what = repr(wanted) if wanted else f"of the usual names ({', '.join(usual)})"
        raise DataError(f"{path} has no column {what}, but {', '.join(map(str, columns)) or 'none'}: {how}")
    return known[0]


def clean(texts: Iterable[Any]) -> tuple[str, ...]:
    """One line each, empty ones dropped."""
    lines = (" ".join(text.split()) for text in texts if isinstance(text, str))
    return tuple(line for line in lines if line)
