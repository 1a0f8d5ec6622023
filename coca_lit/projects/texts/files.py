"""Texts without images: what the files hold."""

import glob
import os
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from coca_lit.data.datasets.annotations import read_references
from coca_lit.data.records import clean_captions, not_found
from coca_lit.errors import DataError
from coca_lit.reading import encoding_of, open_regular, parse_json, printable

TextFiles = str | Sequence[str]


def read_texts(files: TextFiles) -> list[str]:
    """All texts of some files, in the order of the files.

    Args:
        files: paths or patterns. NAME.txt holds one text per line; NAME.jsonl a JSON text, or an object with "text" or
            "caption", per line; NAME.json and NAME.json.gz hold captions in the schema of COCO or Karpathy, of which
            the training split is taken.

    Raises:
        DataError: a pattern matches nothing, a file is none of these, or there are no texts at all.
    """
    patterns = [files] if isinstance(files, str) else list(files)
    texts: list[str] = []
    for pattern in patterns:
        paths = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise not_found("texts", [pattern], "data.text takes .txt, .jsonl and caption files, or patterns of them")
        for path in paths:
            texts += clean_captions(_texts_in(Path(path)))
    if not texts:
        raise DataError(f"{', '.join(patterns)} hold no text")
    return texts


def _texts_in(path: Path) -> Iterator[str]:
    if path.suffix == ".json" or path.name.endswith(".json.gz"):
        for item in read_references(path, "train"):
            yield from item.captions
    elif path.suffix == ".txt":
        yield from _lines(path)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(_lines(path), start=1):
            yield _text(path, number, line)
    else:
        raise DataError(f"{path} is neither a .txt, a .jsonl nor a caption file (.json, .json.gz)")


def _lines(path: Path) -> list[str]:
    """The lines that are not empty."""
    try:
        with open_regular(path) as file:
            lines = TextIOWrapper(file, encoding_of(file.peek(2)), errors="replace", newline="\n")
            stripped = [line.strip() for line in lines]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return [line for line in stripped if line]


def _text(path: Path, number: int, line: str) -> str:
    try:
        content: Any = parse_json(line, "it")
    except DataError as error:
        raise DataError(f"{path}, text {number} is not JSON: {error}") from error
    text = content.get("text", content.get("caption")) if isinstance(content, dict) else content
    if not isinstance(text, str):
        raise DataError(
            f'{path}, text {number}: expected a text, or an object with "text" or "caption", got {printable(line[:80])}'
        )
    return text
