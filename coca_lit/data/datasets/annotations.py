"""Readers of annotation files: Karpathy's `dataset_*.json`, COCO captions (also nocaps), and tables."""

import csv
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any

from coca_lit.data.records import Listing, not_found
from coca_lit.errors import DataError
from coca_lit.reading import (
    encoding_of,
    is_int64,
    not_utf8,
    open_parquet,
    parse_json,
    printable,
    read_bounded,
    read_json,
)

MAX_BYTES = 512 * 2**20  # of JSON; the largest known file, the training answers of VQA v2, has 366 MB


def read_karpathy(path: Path, split: str) -> list[Listing]:
    """Images of one split of `{"images": [{filename, split, imgid, cocoid?, sentences: [{raw}]}]}`.

    "train" includes COCO's "restval", as is customary (82,783 + 30,504 images). Ids are `cocoid` where present, else
    `imgid`. Raises `DataError` for malformed files and unknown splits.
    """
    return _karpathy_listings(read_json(path, limit=MAX_BYTES), path, split)


def _karpathy_listings(content: Any, path: Path, split: str | None) -> list[Listing]:
    with schema(path, "Karpathy's"):
        images = content["images"]
        splits = sorted({image["split"] for image in images})
        wanted = set(splits)
        if split is not None:
            wanted = {"train", "restval"} if split == "train" else {split}
        if not wanted.intersection(splits):
            raise DataError(f"{path} has no split {split!r}; it has {printable(', '.join(splits))}")
        return [
            listing(
                id=image.get("cocoid", image["imgid"]),
                filename=image["filename"],
                captions=[sentence["raw"] for sentence in image["sentences"]],
            )
            for image in images
            if image["split"] in wanted
        ]


def read_coco(path: Path) -> list[Listing]:
    """All images of `{"images": [{id, file_name, domain?}], "annotations": [{image_id, caption}]}`.

    Raises `DataError` for malformed files, and for lists of images without captions, such as the test sets.
    """
    return coco_listings(read_json(path, limit=MAX_BYTES), path)


def coco_listings(content: Any, path: Path) -> list[Listing]:
    """As `read_coco`, of the content of the file."""
    with schema(path, "the COCO captions"):
        captions: dict[int | str, list[str]] = defaultdict(list)
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        if captions and not captions.keys() & {image["id"] for image in content["images"]}:
            raise ValueError(f"no image has the image_id of a caption, such as {next(iter(captions))!r}")
        return [
            listing(
                id=image["id"],
                filename=image["file_name"],
                captions=captions[image["id"]],
                domain=image.get("domain"),
            )
            for image in content["images"]
        ]


def read_references(path: Path, split: str | None) -> list[Listing]:
    """Images of a file of either schema; `split` selects from a Karpathy file, None takes all splits.

    Raises `DataError`, also for an image that is listed twice.
    """
    content = read_json(path, limit=MAX_BYTES)
    coco = isinstance(content, dict) and "annotations" in content
    listings = coco_listings(content, path) if coco else _karpathy_listings(content, path, split)
    twice = [key for key, count in Counter(item.id for item in listings).items() if count > 1]
    if twice:
        raise DataError(f"{path} lists image {twice[0]!r} twice")
    return listings


def read_json_lines(path: Path) -> Iterator[Any]:
    """The values of a file with one JSON value a line. Raises `DataError`."""
    content = read_bounded(path, MAX_BYTES, "cannot be read")
    if encoding_of(content) == "utf-16":
        content = content.decode("utf-16", errors="replace").encode()
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            yield parse_json(line, f"line {number} of {path}")


def listing(
    id: int | str,
    filename: str,
    captions: Sequence[str],
    domain: str | None = None,
    question: str = "",
    further: Sequence[str] = (),
) -> Listing:
    """A `Listing` of values from JSON; raises `TypeError` for one of another type."""
    texts = [filename, question, *captions, *further, *([] if domain is None else [domain])]
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise TypeError(f"expected a text, got {wrong[0]!r:.80}")
    return Listing(check_id(id), filename, tuple(captions), domain, question, tuple(further))


def check_id(id: int | str) -> int | str:
    """An id from JSON; raises `TypeError` unless it is a text or a whole number of 64 bits."""
    if not isinstance(id, str) and not is_int64(id):
        raise TypeError(f"expected an id, a text or a whole number, got {id!r:.80}")
    return id


def find_file(what: str, candidates: Sequence[Path], how: str) -> Path:
    """The first of the paths that is a file; arguments and error as of `not_found`."""
    for path in candidates:
        if path.is_file():
            return path
    raise not_found(what, candidates, how)


def named_split(split: str, names: Mapping[str, str], data: str) -> str:
    """What the files of a data set call a split; raises `DataError` for one that it lacks."""
    if split not in names:
        raise DataError(f"{data} has the splits {', '.join(names)}, not {printable(split)!r}")
    return names[split]


@contextmanager
def schema(path: Path, name: str) -> Iterator[None]:
    """Turns the error of a missing or mistyped field into a `DataError`."""
    try:
        yield
    except KeyError as error:
        raise DataError(f"{path} does not follow {name} schema: the field {error} is missing") from error
    except (TypeError, AttributeError, ValueError, OverflowError) as error:
        wrong = "a list stands where an object belongs" if "list indices" in str(error) else error
        raise DataError(f"{path} does not follow {name} schema: {wrong}") from error


# Tables of image files and captions: .csv, .tsv and .parquet. Usual names of columns and fields, the likeliest first.
IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "filename", "file_name", "path", "file")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "description")


def open_table(path: Path) -> tuple[Sequence[str], Iterable[dict[str, Any]]]:
    """The names of the columns, and the rows; raises `DataError` for a file that is no such table."""
    if path.suffix in (".csv", ".tsv"):
        content = read_bounded(path, MAX_BYTES, "is not a readable table")
        try:
            text = content.decode(encoding_of(content))
            start = re.match(r"[\r\n]*(?:\"?sep=(?P<delimiter>.)\"?[\r\n]+)?", text)  # a line for Excel
            assert start is not None
            lines_before = start[0].count("\n")
            text = text[start.end() :]
            if path.suffix == ".tsv":
                delimiter = "\t"
            else:  # a semicolon where the comma separates decimals
                delimiter = start["delimiter"] or max(",;\t", key=text.partition("\n")[0].count)
            reader = csv.DictReader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
            columns = [*_different(reader.fieldnames or [], path)]
            while columns and not columns[-1].strip():  # spreadsheets write empty ones
                columns.pop()
            reader.fieldnames = columns
            rows = []
            for row in reader:
                if any(row.pop(None, ())):  # fields without a column
                    raise DataError(
                        f"line {lines_before + reader.line_num} of {path} has more fields than the {len(columns)} "
                        f"columns: put texts that contain {delimiter!r} in quotes, or name all columns"
                    )
                rows.append(row)
            return columns, rows
        except UnicodeDecodeError as error:
            raise DataError(not_utf8(path, error)) from error
        except csv.Error as error:
            raise DataError(f"{path} is not a readable table: {error}; save it in UTF-8, with quotes closed") from error
    if path.suffix != ".parquet":
        raise DataError(f"{path} is not a .csv, .tsv or .parquet file")
    with open_parquet(path) as table:
        names = _different(table.schema_arrow.names, path)
    return names, _parquet_rows(path)


def _different(names: Sequence[str], path: Path) -> Sequence[str]:
    """The names of columns; raises `DataError` if two are the same, of which one would count."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise DataError(f"{path} has several columns {printable(twice[0])}: rename them, or write a row for each")
    return names


def read_rows(path: Path) -> Iterable[Any]:
    """The rows of a table, or the values of a .jsonl; raises `DataError` as `open_table`."""
    return read_json_lines(path) if path.suffix == ".jsonl" else open_table(path)[1]


def file_name(text: str) -> str:
    """The file that a row names: ./a.jpg is a.jpg."""
    return PurePosixPath(text.strip().replace(os.sep, "/")).as_posix()


def captions_in(field: Any, path: Path) -> list[Any]:
    """The captions in a field, one or a list of them. Raises `DataError` for a list that is written as a text, as
    pandas does in a .csv.
    """
    if isinstance(field, str) and re.fullmatch(r"\[\s*['\"].*\]", field, re.DOTALL):
        raise DataError(f"{path} has a list in one field, {printable(field[:80])}: write a row per caption")
    return field if isinstance(field, list) else [field]


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    with open_parquet(path) as table:
        for batch in table.iter_batches():
            yield from batch.to_pylist()


def column(path: Path, columns: Sequence[str], usual: Sequence[str], how: str, wanted: str | None = None) -> str:
    """The name of a column: the one that is wanted, else the one of the usual names that the table has.

    Args:
        how: the user can name it, for the error.

    Raises:
        DataError: there is none, or several have usual names.
    """
    if wanted:
        found = wanted if wanted in columns else None
    else:
        found = named(columns, usual)
        folded = {str(name).strip().lower() for name in columns}
        several = [name for name in usual if name in folded and (name != "captions" or "caption" not in folded)]
        if len(several) > 1:
            either = " and ".join(several)
            raise DataError(f"{path} has the columns {either}, of which either may be meant: {how}, or leave one out")
    if found is None:
        what = repr(wanted) if wanted else f"of the usual names ({', '.join(usual)})"
        raise DataError(f"{path} has no column {what}, but {', '.join(map(str, columns)) or 'none'}: {how}")
    return found


def named(columns: Iterable[str], usual: Sequence[str]) -> str | None:
    """The first of the usual names that a table has, else the first that it has in capitals or with blanks around."""
    columns = list(columns)
    folded = {str(name).strip().lower(): name for name in reversed(columns)}
    written = (name for name in usual if name in columns)
    return next(written, None) or next((folded[name] for name in usual if name in folded), None)


def clean(texts: Iterable[Any]) -> tuple[str, ...]:
    """One line each, empty ones dropped."""
    lines = (" ".join(text.split()) for text in texts if isinstance(text, str))
    return tuple(line for line in lines if line)
