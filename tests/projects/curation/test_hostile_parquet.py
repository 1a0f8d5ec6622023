"""Parquet files of strangers: scores and selections of samples."""

import os
import re
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("duckdb")
import pyarrow as pa
from pyarrow import parquet

from coca_lit.data.shards.selection import read_selection
from coca_lit.errors import DataError
from coca_lit.projects.curation.choose import filter_scores
from coca_lit.projects.curation.scores import read_about, write_scores
from helpers.fuzzing import COUNT, bounded, damaged, fuzz

pytestmark = pytest.mark.slow

READERS = {"kept.parquet": read_selection, "x.scores.parquet": read_about}


@pytest.mark.parametrize("name", READERS)
def test_a_fifo_does_not_block(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=re.escape(name)):
        READERS[name](tmp_path / name)


def test_parquet_of_other_columns(tmp_path):
    parquet.write_table(pa.table({"shard": [1], "key": [2]}), tmp_path / "kept.parquet")
    with pytest.raises(DataError, match="shard and key"):
        read_selection(tmp_path / "kept.parquet")
    (tmp_path / "kept.parquet").rename(tmp_path / "x.scores.parquet")
    with pytest.raises(DataError, match="did not write it"):
        read_about(tmp_path / "x.scores.parquet")
    with pytest.raises(DataError, match=r"^[^\n]+$"):
        filter_scores([tmp_path / "x.scores.parquet"], tmp_path / "new.parquet", "similarity > 1")


def test_a_selection_of_a_few_bytes_that_claims_gigabytes(tmp_path):
    path, rows = tmp_path / "kept.parquet", 4_000_000
    table = pa.table({"shard": _repeated("a.tar", rows), "key": _repeated("x" * 10_000, rows)})  # 40 GB as texts
    parquet.write_table(table, path, row_group_size=rows)
    assert path.stat().st_size < 20_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = read_selection(path)
    assert (found.counts, found.keys("a.tar")) == ({"a.tar": rows}, {"x" * 10_000})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # kB


def test_a_row_group_of_too_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("coca_lit.reading.MAX_GROUP", 10)
    parquet.write_table(pa.table({"shard": ["a"] * 11, "key": ["b"] * 11}), tmp_path / "kept.parquet")
    with pytest.raises(DataError, match="10 rows or 1,073,741,824 bytes"):
        read_selection(tmp_path / "kept.parquet")


def _repeated(text: str, rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), [text])


@pytest.fixture(scope="module")
def chosen(forged_files) -> dict[str, bytes]:
    columns = {"key": ["1", "2"], "similarity": [0.1, 0.2], "phash": [1, 2]}
    about = {"shard": [1, 1], "bad": {}, "examples": [], "model": "m"}
    write_scores(forged_files / "a.scores.parquet", "a.tar", columns, about)
    filter_scores([forged_files / "a.scores.parquet"], forged_files / "kept.parquet")
    return {name: (forged_files / name).read_bytes() for name in ("a.scores.parquet", "kept.parquet")}


@settings(fuzz, max_examples=COUNT or 15)  # a database is opened for each
@given(st.data())
def test_forged_scores_and_selections(forged_files, chosen, data):
    scores, kept = forged_files / "forged.scores.parquet", forged_files / "forged.parquet"
    scores.write_bytes(data.draw(damaged(chosen["a.scores.parquet"])))
    kept.write_bytes(data.draw(damaged(chosen["kept.parquet"])))
    with bounded():
        read_about(scores)
    with bounded():
        found = read_selection(kept)
        for shard in found.counts:
            found.keys(shard)
    with bounded():
        filter_scores([scores], forged_files / "new.parquet", selection=kept)
