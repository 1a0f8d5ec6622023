"""Choosing samples by their scores: SQL over the Parquet files by DuckDB, which needs no server and spills to disk what
does not fit into memory. The result is a selection, see `coca_lit.data.shards.selection`.

The statements are plain SQL over the columns of the scores, see README.md; keys never become part of them,
formulas of the user do. These see the columns and nothing else: DuckDB opens no file but the scores and the selection.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from coca_lit.data.shards.selection import COLUMNS, read_selection
from coca_lit.errors import DataError
from coca_lit.files import replacing
from coca_lit.projects.curation.scores import ABOUT, check_current
from coca_lit.reading import open_parquet, printable

if TYPE_CHECKING:
    import pyarrow as pa
    from duckdb import DuckDBPyConnection

FLAT = 200_000  # embeddings that are compared one by one; more are sorted into cells, of which the nearest are searched
CELLS = 32  # that are searched
BATCH = 1024  # embeddings that are searched for together
GROUP = 2**16  # samples in a row group of a selection, the smallest part that is read
_MISSING = "{} needs an optional package: pip install 'coca_lit[curate]'"


class Chosen(NamedTuple):
    """What a choice has left."""

    kept: int
    total: int
    how: dict[str, Any]  # in the metadata of the selection, too


def filter_scores(
    scores: Sequence[Path],
    output: Path,
    where: str = "true",
    top: float | None = None,
    by: str | None = None,
    selection: Path | None = None,
    memory_gb: float | None = None,
) -> Chosen:
    """Selects the samples for which a condition holds, and of these the best.

    Args:
        where: a condition in SQL, such as "similarity > 0.2 AND words > 2". Unknown values fulfil none.
        top: the share of them that is kept; samples that equal the last one are kept, too.
        by: what the best ones have most of: a column, or a formula in SQL.
        selection: of an earlier choice; only its samples are considered.
        memory_gb: that DuckDB may take; None for most of what there is.

    Raises:
        DataError: a formula is wrong, a file cannot be read or written, or the output is a file of another kind.
    """
    if (top is None) != (by is None):
        raise DataError("the best samples need both a share and a score: top=0.3 by=similarity")
    if top is not None and not 0 < top <= 1:
        raise DataError(f"top must be a share above 0 and up to 1, not {top}")
    _check_output(output)
    with _opened(output, memory_gb, [*scores, *([selection] if selection else [])]) as db:
        total = _view(db, "scores", {path: check_current(path) for path in scores}, selection)
        chosen = f"SELECT shard, key FROM scores WHERE {_expression('where', where)}"
        how = {"statement": f"{chosen} ORDER BY shard, key", "selection": str(selection) if selection else None}
        if by is not None:
            scored = chosen.replace("key", f"key, {_number('by', by)} AS score", 1)
            kept = "TABLE" if _varies(db, f"{where} {by}") else "VIEW"
            db.execute(f"CREATE TEMP {kept} scored AS {scored}")
            (count,) = _row(db, "SELECT count(score) FROM scored")
            place = max(1, round(count * (top or 1)))
            ranked = "SELECT score FROM scored WHERE score IS NOT NULL ORDER BY score DESC"
            (last,) = _row(db, f"SELECT max(score) FROM ({ranked} LIMIT 1 OFFSET {place - 1})")
            chosen = f"SELECT shard, key FROM scored WHERE score >= '{last or 0:.17e}'::DOUBLE"  # may be infinite
            how["statement"] = f"WITH scored AS ({scored}) {chosen} ORDER BY shard, key"
        statement = f"{chosen} ORDER BY shard, key"
        return Chosen(write_selection(output, _batches(db, statement, GROUP), how), total, how)


def dedup_scores(
    scores: Sequence[Path],
    output: Path,
    against: Sequence[Path] = (),
    hash_distance: int | None = 0,
    cosine: float | None = None,
    best: str = "similarity",
    selection: Path | None = None,
    memory_gb: float | None = None,
) -> Chosen:
    """Selects samples no two of which are near-duplicates of each other, and none of which is one of another set's.

    First one of all samples with the same perceptual hash stays, then one of those with similar hashes, then one of
    those with similar embeddings. It is the one with the most of `best`; ties are broken by shard and key. Samples are
    taken in that order, and one stays unless a near-duplicate has stayed before.

    Args:
        against: scores of other sets, of which no near-duplicate may stay: earlier data, or the images of evaluations.
        hash_distance: bits of 64 in which the hashes of near-duplicates differ at most; None compares no hashes.
        cosine: of embeddings, from which on images are near-duplicates; None compares no embeddings.
        best: a column, or a formula in SQL.
        selection, memory_gb: as in `filter_scores`. The embeddings that stay are held in memory on top of that.

    Raises:
        DataError: as in `filter_scores`.
    """
    if hash_distance is None and cosine is None:
        raise DataError("near-duplicates are found by hash_distance, by cosine or by both: give one of them")
    if hash_distance is not None and not 0 <= hash_distance < 16:
        raise DataError(f"hash_distance must be between 0 and 15 of 64 bits, not {hash_distance}")
    if cosine is not None and not 0 < cosine <= 1:
        raise DataError(f"cosine must be above 0 and up to 1, not {cosine}")
    _check_output(output)
    own, others = ({path: check_current(path) for path in paths} for paths in (scores, against))
    if cosine is not None:  # embeddings of other models cannot be compared; captions do not matter
        _check_alike(own | others, "model", "precision")
    with _opened(output, memory_gb, [*scores, *against, *([selection] if selection else [])]) as db:
        total = _view(db, "scores", own, selection)
        if others:
            _view(db, "others", others)
        else:
            db.execute("CREATE TEMP VIEW others AS SELECT * FROM scores WHERE false")
        for name in ("scores", "others"):
            if hash_distance is not None:
                _check_column(db, name, "phash", "BIGINT")
            if cosine is not None:
                _check_column(db, name, "embedding", "FLOAT[", "DOUBLE[")
        phash = "phash" if hash_distance is not None else "NULL::BIGINT AS phash"
        order = "best DESC NULLS LAST, shard, key"
        # `priority` counts from 1 in the order in which samples are taken. An unknown hash equals no other.
        db.execute(
            f"CREATE TEMP TABLE left_over AS SELECT shard, key, phash, row_number() OVER (ORDER BY {order}) AS priority"
            f" FROM (SELECT * FROM (SELECT shard, key, {phash}, {_number('best', best)} AS best FROM scores)"
            f" QUALIFY phash IS NULL OR row_number() OVER (PARTITION BY phash ORDER BY {order}) = 1)"
        )
        _drop(db, _similar_hashes(db, hash_distance) if hash_distance is not None else [])
        _drop(db, _similar_embeddings(db, cosine) if cosine is not None else [])
        how = {"hash_distance": hash_distance, "cosine": cosine, "best": best, "against": [*map(str, against)]}
        how["selection"] = str(selection) if selection else None
        rows = _batches(db, "SELECT shard, key FROM left_over ORDER BY shard, key", GROUP)
        return Chosen(write_selection(output, rows, how), total, how)


def write_selection(path: Path, batches: "Iterable[pa.RecordBatch]", about: Mapping[str, Any]) -> int:
    """Writes rows (shard, key), sorted by shard; returns their number.

    Args:
        about: how they were chosen; kept in the metadata.

    Raises:
        DataError: nothing can be written there.
    """
    import pyarrow as pa
    from pyarrow import parquet

    metadata = {"coca_lit": json.dumps(about, ensure_ascii=True)}
    schema = pa.schema([(name, pa.string()) for name in COLUMNS], metadata=metadata)
    rows = 0
    with replacing(path) as temporary, parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_table(pa.Table.from_batches([batch]).cast(schema), row_group_size=GROUP)
            rows += batch.num_rows
    return rows


def _check_output(output: Path) -> None:
    """Raises `DataError` for a file that is no selection: scores, for example, take hours to make."""
    if not output.exists():
        return
    try:
        with open_parquet(output) as file:
            schema = file.schema_arrow
    except DataError:
        schema = None
    if schema is None or schema.names != [*COLUMNS] or ABOUT not in (schema.metadata or {}):
        raise DataError(f"{output} exists and is no selection: choose another output")


@contextmanager
def _opened(output: Path, memory_gb: float | None, files: Sequence[Path]) -> "Iterator[DuckDBPyConnection]":
    """A database in memory, whose temporary files are beside the output, and which reads these files alone; its errors
    become `DataError`s.
    """
    try:
        import duckdb
    except ImportError as error:
        raise DataError(_MISSING.format("choosing samples")) from error
    config: dict[str, Any] = {"temp_directory": str(output.absolute().with_name(f".{output.name}.spilled"))}
    # From Parquet's statistics, which leave out NaN, DuckDB concludes that there is none.
    config["disabled_optimizers"] = "statistics_propagation"
    config |= {"autoinstall_known_extensions": "false"} | ({"memory_limit": f"{memory_gb}GB"} if memory_gb else {})
    paths = ", ".join("'{}'".format(str(file.absolute()).replace("'", "''")) for file in files)
    try:
        with duckdb.connect(config=config) as db:
            for setting in (
                f"allowed_paths = [{paths}]",
                "enable_external_access = false",
                "lock_configuration = true",
            ):
                db.execute(f"SET {setting}")
            yield db
    except duckdb.ConversionException as error:  # whose message quotes the value
        raise DataError("a formula converts a value to another type, which it does not fit: use TRY_CAST") from error
    except duckdb.Error as error:
        raise DataError(printable(" ".join(str(error).partition("\n\n")[0].split()))) from error


def _view(db: "DuckDBPyConnection", name: str, scores: Mapping[Path, Any], selection: Path | None = None) -> int:
    """Makes the rows of files a view, of which only a selection is seen; returns the number of all rows."""
    _check_alike(scores, "model", "precision", "caption_key")
    rows = db.read_parquet([str(path.absolute()) for path in scores], union_by_name=True)
    rows.create_view(f"all_{name}")
    for column in COLUMNS:
        _check_column(db, f"all_{name}", column, "VARCHAR")
    chosen = ""
    if selection is not None:
        read_selection(selection)  # raises one clear sentence if the file is not a selection
        db.read_parquet(str(selection.absolute())).create_view("selected")
        chosen = "SEMI JOIN selected USING (shard, key)"
    db.execute(f"CREATE TEMP VIEW {name} AS SELECT * FROM all_{name} {chosen}")
    (count,) = _row(db, f"SELECT count(*) FROM all_{name}")
    return int(count)


def _check_column(db: "DuckDBPyConnection", view: str, column: str, *kinds: str) -> None:
    """Raises `DataError` unless a view has a column of one of these types of DuckDB's; FLOAT[ stands for FLOAT[512]."""
    found = {name: str(kind) for name, kind, *_ in db.execute(f"DESCRIBE {view}").fetchall()}.get(column, "none")
    if not any(found.startswith(kind) if kind.endswith("[") else found == kind for kind in kinds):
        raise DataError(f"the scores need a column {column} of type {kinds[0].rstrip('[')}, found {printable(found)}")


def _check_alike(scores: Mapping[Path, Any], *settings: str) -> None:
    """Raises `DataError` if files, with what they record about themselves, were made with different settings."""
    makers = {repr([about.get(key) for key in settings]): path for path, about in scores.items() if about}
    if len(makers) > 1:
        one, other = [*makers.values()][:2]
        raise DataError(f"{one} and {other} were scored with a different {' or '.join(settings)}: score both alike")


def _row(db: "DuckDBPyConnection", statement: str) -> tuple[Any, ...]:
    """The only row of a statement."""
    (row,) = db.execute(statement).fetchall()
    return tuple(row)


def _batches(db: "DuckDBPyConnection", statement: str, size: int) -> "Iterator[pa.RecordBatch]":
    """The rows of a statement; the next one has to wait for their end."""
    rows: Any = db.sql(statement)  # whose type lacks this method
    yield from rows.to_arrow_reader(size)


def _expression(name: str, text: str) -> str:
    """The text in parentheses, if it is one expression in SQL."""
    import duckdb

    try:
        duckdb.SQLExpression(text)
    except duckdb.Error as error:
        raise DataError(f"{name}={text!r} is not a formula in SQL: {str(error).splitlines()[0]}") from error
    return f"({text}\n)" if "--" in text else f"({text})"  # a comment ends with its line


def _varies(db: "DuckDBPyConnection", text: str) -> bool:
    """Whether formulas may have another value each time, such as random()."""
    found = "SELECT count(*) FROM duckdb_functions() WHERE stability IN ('VOLATILE', 'CONSISTENT_WITHIN_QUERY')"
    return bool(db.execute(f"{found} AND contains(lower(?), function_name)", [text]).fetchall()[0][0])


def _number(name: str, text: str) -> str:
    """A formula as a number; unknown where it is none."""
    return f"nullif(CAST({_expression(name, text)} AS DOUBLE), 'nan'::DOUBLE)"


def _drop(db: "DuckDBPyConnection", priorities: Sequence[int]) -> None:
    import pyarrow as pa

    db.register("dropped", pa.table({"priority": pa.array(priorities, pa.int64())}))
    db.execute("DELETE FROM left_over WHERE priority IN (SELECT priority FROM dropped)")
    db.unregister("dropped")


def _similar_hashes(db: "DuckDBPyConnection", distance: int) -> list[int]:
    """Priorities of the samples whose hash is within `distance` bits of one that stays, or of another set.

    Two hashes that differ in d bits are equal in at least one of d + 1 groups of bits (the pigeonhole principle), so
    only those that share a group are compared.
    """
    bounds = [round(64 * i / (distance + 1)) for i in range(distance + 2)]
    groups = " UNION ALL ".join(
        f"SELECT *, {i} AS part, (phash >> {start}) & {(1 << (stop - start)) - 1 if stop - start < 64 else -1} AS bits "
        "FROM hashes"
        for i, (start, stop) in enumerate(pairwise(bounds))
    )
    pairs = _batches(
        db,
        f"""WITH hashes AS (
            SELECT phash, priority FROM left_over
            UNION ALL SELECT DISTINCT phash, 0 FROM others
        ), parts AS ({groups})
        SELECT DISTINCT a.priority, b.priority FROM parts a JOIN parts b USING (part, bits)
        WHERE a.priority < b.priority AND bit_count(xor(a.phash, b.phash)) <= {distance}
        ORDER BY a.priority, b.priority""",
        GROUP,
    )
    dropped: set[int] = set()
    for batch in pairs:
        for stays, other in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
            if stays not in dropped:  # known by now: all pairs of better samples came before
                dropped.add(other)
    return sorted(dropped)


def _similar_embeddings(db: "DuckDBPyConnection", cosine: float) -> list[int]:
    """Priorities of the samples whose embedding is within `cosine` of one that stays, or of another set."""
    samples = "left_over JOIN scores USING (shard, key)"
    if not _row(db, "SELECT count(*) FROM left_over")[0]:
        return []  # hashes have left none
    index = _index(db, samples)
    dropped: list[int] = []
    for statement in (
        "SELECT 0, embedding FROM others",
        f"SELECT priority, embedding FROM {samples} ORDER BY priority",
    ):
        for batch in _batches(db, statement, BATCH):
            priorities, vectors = batch.column(0).to_numpy(), _vectors(batch.column(1))
            if vectors.shape[1] != index.d:
                raise DataError("the embeddings have different widths: score all sets with the same model")
            if priorities[0] == 0:
                index.add(vectors)
                continue
            near = index.search(vectors, 1)[0][:, 0] >= cosine
            alike = vectors @ vectors.T >= cosine  # within the batch
            for i in range(len(vectors)):
                near[i] |= bool((alike[i, :i] & ~near[:i]).any())
            index.add(vectors[~near])
            dropped += priorities[near].tolist()
    return dropped


def _index(db: "DuckDBPyConnection", samples: str) -> Any:
    """An empty index for inner products of embeddings: up to `FLAT` are compared with all others, more with the nearest
    cells alone.
    """
    try:
        import faiss
    except ImportError as error:
        raise DataError(_MISSING.format("comparing embeddings")) from error
    own, others, width = _row(db, f"SELECT count(*), (SELECT count(*) FROM others), max(len(embedding)) FROM {samples}")
    if own + others <= FLAT:
        return faiss.IndexFlatIP(width)
    cells = min(int(4 * (own + others) ** 0.5), own)  # each is placed by own samples
    index: Any = faiss.index_factory(width, f"IVF{cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
    some = f"SELECT embedding FROM {samples} WHERE priority % {max(1, own // (64 * cells))} = 0 ORDER BY priority"
    index.train(np.concatenate([_vectors(batch.column(0)) for batch in _batches(db, some, BATCH)]))
    index.nprobe = CELLS
    return index


def _vectors(column: Any) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """The rows of a column of lists (B, E), scaled to unit length."""
    rows = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    if column.null_count or not len(column) or len(rows) % len(column):
        raise DataError("some samples have no embedding: score them with --embeddings")
    vectors = rows.reshape(len(column), -1)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
