"""Scores of the samples of a shard: NAME.scores.parquet beside NAME.tar, or in a folder of their own.

A row per usable sample, in the order of the tar. Any engine that reads Parquet can work with the columns, which
README.md beside this file lists.
"""

import glob
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coca_lit.data.shards.shard import sha256_of
from coca_lit.errors import DataError, DataNotFoundError
from coca_lit.files import replacing, state_of
from coca_lit.reading import counts_of, open_parquet, parse_json, texts_of

log = logging.getLogger(__name__)

SUFFIX = ".scores.parquet"
SETTINGS = "scores.settings.json"  # beside them: what made all scores of a folder
ABOUT = b"coca_lit"  # key of the metadata


def scores_path(shard: Path, folder: Path | None = None) -> Path:
    """Where the scores of a shard are, by default beside it."""
    return (folder or shard.parent) / f"{shard.name.removesuffix('.tar')}{SUFFIX}"


def write_scores(path: Path, shard: str, columns: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Writes the columns of a shard, with its name as a further one; a matrix becomes a column of lists.

    Raises:
        DataError: nothing can be written there.
    """
    import pyarrow as pa
    from pyarrow import parquet

    rows = len(columns["key"]) if columns else 0
    arrays: dict[str, Any] = {"shard": pa.array([shard] * rows, pa.string())}
    for name, values in columns.items():
        if isinstance(values, np.ndarray) and values.ndim == 2:
            arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        else:
            arrays[name] = pa.array(values, from_pandas=True)  # not a number: unknown
    table = pa.table(arrays).replace_schema_metadata({ABOUT: json.dumps(about).encode()})
    with replacing(path) as temporary:
        parquet.write_table(table, temporary, compression="zstd")


def read_about(path: Path, foreign: bool = False) -> dict[str, Any]:
    """What a file records about itself: settings; "shard": its size and modification time; "bad", "examples": what was
    left out; "samples": the number of its rows. Raises `DataError` unless `coca-data score` wrote it; a `foreign` one
    may also say nothing.
    """
    with open_parquet(path) as file:
        metadata = file.schema_arrow.metadata or {}
        if foreign and ABOUT not in metadata:
            return {}
        try:
            about = parse_json(metadata[ABOUT], str(path), dict)
            size, changed_at = about["shard"]
            counts_of({"size": size, "changed_at": changed_at})
            counts_of(about["bad"])
            texts_of(about["examples"])
            return {**about, "samples": file.metadata.num_rows}
        except (DataError, LookupError, TypeError, ValueError) as error:
            raise DataError(
                f"{path} exists and coca-data score did not write it: choose another output, or remove it"
            ) from error


def find_scores(words: Sequence[str | Path]) -> list[Path]:
    """The files of scores that folders, patterns and file names stand for, in order and each once.

    Raises:
        DataNotFoundError: a word stands for none.
        DataError: two files have the same name, so that their shards could not be told apart.
    """
    found: dict[str, Path] = {}
    for word in map(str, words):
        pattern = os.path.join(glob.escape(word), f"*{SUFFIX}") if os.path.isdir(word) else word
        paths = [word] if os.path.isfile(word) else sorted(glob.glob(pattern, recursive=True))
        tars = sorted(glob.glob(os.path.join(glob.escape(word), "*.tar")))  # of a folder
        bare = [tar for tar in tars if f"{tar.removesuffix('.tar')}{SUFFIX}" not in paths]
        if bare and paths:
            raise DataError(
                f"{len(bare)} shards in {word} have no scores, e.g. {Path(bare[0]).name}: repeat coca-data score, or "
                f"name the files of scores, such as {word}/*{SUFFIX}"
            )
        if not paths:
            raise DataNotFoundError(f"no scores at {word}: write them with coca-data score")
        for path in map(Path, paths):
            if found.setdefault(path.name, path) != path:
                raise DataError(f"{found[path.name]} and {path} are of shards of the same name: choose from one set")
            if glob.has_magic(str(path)):
                raise DataError(f"{path} could be a pattern of paths to DuckDB: rename it without *, ? and [")
    return list(found.values())


def check_current(path: Path) -> dict[str, Any]:
    """What scores record about themselves, nothing if another program's. Raises `DataError` if the shard beside them
    has changed since: its keys may name other samples. A copy that has lost its time is read as a whole and known by
    its digest, if it had a manifest when it was scored.
    """
    about = read_about(path, foreign=True)
    shard = path.with_name(path.name.removesuffix(SUFFIX) + ".tar")
    if about and shard.exists() and [*state_of(shard)] != about["shard"]:
        same_size = shard.stat().st_size == about["shard"][0]
        if same_size and "content" in about:
            log.warning("%s has another time than when it was scored, so its content is compared", shard)
        if not same_size or sha256_of(shard) != about.get("content"):
            raise DataError(f"{shard} has changed since it was scored: repeat coca-data score")
    return about
