"""`coca-data filter` and `coca-data dedup` select what a loop over all samples, and all pairs of them, would select."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("duckdb")
import pyarrow as pa
from pyarrow import parquet

from coca_lit.errors import DataError
from coca_lit.projects.curation import choose
from coca_lit.projects.curation.choose import dedup_scores, filter_scores
from coca_lit.projects.curation.scores import find_scores, write_scores
from coca_lit.tools.prepare.command import data as coca_data

Row = dict[str, Any]
ABOUT = {"model": "m", "precision": "fp32", "caption_key": "txt", "shard": [1, 1], "bad": {}, "examples": []}


def write(folder: Path, count: int = 300, per_shard: int = 100, seed: int = 0, **more: Any) -> list[Row]:
    """Scores of shards as `coca-data score` writes them, with duplicates among hashes and embeddings."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    hashes = rng.integers(-(2**63), 2**63, 60)
    near = hashes[rng.integers(0, 60, count)] ^ (1 << rng.integers(0, 62, count)) * rng.integers(0, 2, count)
    vectors = rng.normal(size=(40, 8))[rng.integers(0, 40, count)] + 0.05 * rng.normal(size=(count, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    columns = {
        "key": np.array([f"{i:06d}" for i in range(count)]),
        "similarity": np.round(rng.normal(0.2, 0.1, count), 2).astype(np.float32),  # many are equal
        "likelihood": np.where(rng.random(count) < 0.1, np.nan, rng.normal(-3, 1, count)).astype(np.float32),
        "words": rng.integers(1, 9, count).astype(np.int32),
        "phash": near,
        "embedding": vectors.astype(np.float16),
    } | more
    rows = []
    for start in range(0, count, per_shard):
        part = {name: values[start : start + per_shard] for name, values in columns.items()}
        name = f"{start // per_shard:05d}"
        write_scores(folder / f"{name}.scores.parquet", f"{name}.tar", part, ABOUT)
        rows += [
            {"shard": f"{name}.tar"} | dict(zip(part, row, strict=True)) for row in zip(*part.values(), strict=True)
        ]
    return rows


def chosen(path: Path) -> list[tuple[str, str]]:
    return [(row["shard"], row["key"]) for row in parquet.read_table(path).to_pylist()]


def names(rows: list[Row]) -> list[tuple[str, str]]:
    return sorted((row["shard"], str(row["key"])) for row in rows)


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    return write(tmp_path / "a")


def test_thresholds(rows, tmp_path, capsys):
    where = "similarity >= 0.2 AND words > 2 AND likelihood > -3.5"
    coca_data(["filter", str(tmp_path / "a"), f"where={where}", f"output={tmp_path / 'kept.parquet'}"])
    kept = [r for r in rows if r["similarity"] >= np.float32(0.2) and r["words"] > 2 and r["likelihood"] > -3.5]
    assert chosen(tmp_path / "kept.parquet") == names(kept)
    said = capsys.readouterr().out
    assert f"{len(kept)} of 300 samples" in said
    assert f"SELECT shard, key FROM scores WHERE ({where}) ORDER BY shard, key" in said


@pytest.mark.parametrize("by", ["likelihood", "similarity", "similarity + 0.1 * likelihood"])
def test_the_best(rows, tmp_path, by):
    found = filter_scores(find_scores([tmp_path / "a"]), tmp_path / "kept.parquet", "words > 2", top=0.3, by=by)
    value = {
        "likelihood": lambda r: float(r["likelihood"]),
        "similarity": lambda r: float(r["similarity"]),
        "similarity + 0.1 * likelihood": lambda r: float(r["similarity"] + 0.1 * r["likelihood"]),
    }[by]
    scored = [row for row in rows if row["words"] > 2 and not math.isnan(value(row))]
    last = sorted(map(value, scored), reverse=True)[round(0.3 * len(scored)) - 1]
    assert chosen(tmp_path / "kept.parquet") == names([row for row in scored if value(row) >= last - 1e-9])
    assert found.kept >= round(0.3 * len(scored))


@pytest.mark.parametrize(("top", "words"), [(0.05, {5}), (0.9, {1, 2, 3, 5, 6, 7, 8})])
def test_the_best_where_a_formula_divides_by_zero(rows, tmp_path, top, words):
    by = "(words - 4) / greatest(words - 5, 0)"  # -inf below 4 words, NaN at 4, inf at 5
    filter_scores(find_scores([tmp_path / "a"]), tmp_path / "k.parquet", top=top, by=by)
    assert chosen(tmp_path / "k.parquet") == names([row for row in rows if row["words"] in words])


def naive_dedup(rows: list[Row], others: list[Row], distance: int | None, cosine: float | None) -> list[Row]:
    left = sorted(rows, key=lambda r: (-float(r["similarity"]), r["shard"], r["key"]))
    for near in (
        lambda a, b: distance is not None and a["phash"] == b["phash"],
        lambda a, b: distance is not None and differing(a, b) <= distance,
        lambda a, b: cosine is not None and unit(a) @ unit(b) >= cosine,
    ):
        kept: list[Row] = []
        for row in left:
            if not any(near(row, other) for other in [*kept, *others]):
                kept.append(row)
        left = kept
    return left


def differing(a: Row, b: Row) -> int:
    """Bits of the hashes."""
    return ((int(a["phash"]) ^ int(b["phash"])) & (2**64 - 1)).bit_count()


def unit(row: Row) -> np.ndarray:
    vector = row["embedding"].astype(np.float32)
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize(("distance", "cosine"), [(0, None), (1, None), (3, None), (None, 0.98), (2, 0.97)])
def test_near_duplicates(rows, tmp_path, distance, cosine):
    expected = naive_dedup(rows, [], distance, cosine)
    assert 10 < len(expected) < 280
    output = tmp_path / "kept.parquet"
    near = [f"hash_distance={'none' if distance is None else distance}"] + [f"cosine={cosine}"] * (cosine is not None)
    coca_data(["dedup", str(tmp_path / "a"), f"output={output}", *near])
    assert chosen(output) == names(expected)
    content = output.read_bytes()
    dedup_scores(find_scores([tmp_path / "a"]), output, (), distance, cosine)
    assert output.read_bytes() == content


@pytest.mark.parametrize(("distance", "cosine"), [(0, None), (1, None), (None, 0.98), (1, 0.97)])
def test_nothing_of_another_set_stays(rows, tmp_path, distance, cosine):
    pictures = {name: np.array([row[name] for row in rows[::40]]) for name in ("phash", "embedding")}
    others = write(tmp_path / "b", len(rows[::40]), 40, **pictures)
    output = tmp_path / "kept.parquet"
    dedup_scores(find_scores([tmp_path / "a"]), output, find_scores([tmp_path / "b"]), distance, cosine)
    expected = naive_dedup(rows, others, distance, cosine)
    assert names(expected) != names(naive_dedup(rows, [], distance, cosine))
    assert chosen(output) == names(expected)


def test_a_duplicate_of_a_duplicate_stays(tmp_path):
    """At angles of 0, 10 and 20 degrees: the second goes, and the third is near nothing that stays."""
    angles = np.deg2rad([0, 10, 20])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)
    columns = {"key": [*"abc"], "similarity": [0.3, 0.2, 0.1], "embedding": vectors}
    write_scores(tmp_path / "0.scores.parquet", "0.tar", columns, ABOUT)
    dedup_scores(find_scores([tmp_path]), tmp_path / "k.parquet", (), None, math.cos(math.radians(15)))
    assert [key for _, key in chosen(tmp_path / "k.parquet")] == ["a", "c"]


def test_the_share_of_the_best_is_rounded(tmp_path):
    write_scores(
        tmp_path / "0.scores.parquet", "0.tar", {"key": [*"abcde"], "similarity": [0.1, 0.5, 0.3, 0.4, 0.2]}, ABOUT
    )
    filter_scores(find_scores([tmp_path]), tmp_path / "k.parquet", top=0.35, by="similarity")  # 1.75 samples
    assert [key for _, key in chosen(tmp_path / "k.parquet")] == ["b", "d"]


def test_a_formula_that_varies_is_computed_once(rows, tmp_path):
    filter_scores(find_scores([tmp_path / "a"]), tmp_path / "k.parquet", "random() < 2", top=0.1, by="random()")
    assert len(chosen(tmp_path / "k.parquet")) == 30


def test_cells_find_planted_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "FLAT", 1000)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(1500, 32))
    vectors = np.concatenate([vectors, vectors[:300] + 0.02 * rng.normal(size=(300, 32))])
    write(tmp_path / "a", 1800, 600, embedding=vectors.astype(np.float16), similarity=-np.arange(1800) / 1800)
    dedup_scores(find_scores([tmp_path / "a"]), tmp_path / "k.parquet", (), None, 0.98)
    kept = {int(key) for _, key in chosen(tmp_path / "k.parquet")}
    assert set(range(1500)) <= kept  # precision 1
    assert len(kept) <= 1503  # recall 0.99


def test_few_embeddings_against_many(tmp_path, monkeypatch):
    """Fewer than the cells that an index of all would have."""
    monkeypatch.setattr(choose, "FLAT", 500)
    rng = np.random.default_rng(0)
    others = rng.normal(size=(1000, 32))
    own = np.concatenate([others[:5] + 0.02 * rng.normal(size=(5, 32)), rng.normal(size=(15, 32))])
    write(tmp_path / "a", 20, 20, embedding=own.astype(np.float16))
    write(tmp_path / "b", 1000, 500, embedding=others.astype(np.float16))
    against = find_scores([tmp_path / "b"])
    dedup_scores(find_scores([tmp_path / "a"]), tmp_path / "k.parquet", against, None, 0.98)
    assert {int(key) for _, key in chosen(tmp_path / "k.parquet")} == {*range(5, 20)}


def test_a_word_that_comes_twice_names_both(rows, tmp_path):
    words = ["dedup", str(tmp_path / "a"), f"output={tmp_path / 'k.parquet'}"]
    for row, name in zip(rows, "bc", strict=False):
        columns = {"key": ["1"], "similarity": [0.5], "phash": [row["phash"]]}
        write_scores(tmp_path / f"{name}.scores.parquet", f"{name}.tar", columns, ABOUT)
        words.append(f"against={tmp_path / name}.scores.parquet")
    coca_data(words)
    seen = {row["phash"] for row in rows[:2]}
    kept = chosen(tmp_path / "k.parquet")
    assert kept
    assert not {(row["shard"], row["key"]) for row in rows if row["phash"] in seen} & {*kept}


def test_unknown_hashes_are_no_duplicates_and_no_number_is_not_the_best(tmp_path):
    columns = {
        "shard": ["a.tar"] * 6,
        "key": [*"123456"],
        "phash": [None, None, None, 7, 7, 7],
        "quality": [1.0, 2.0, 3.0, 1.0, math.nan, 2.0],
    }
    parquet.write_table(pa.table(columns), tmp_path / "mine.parquet")
    for distance in (0, 2):
        dedup_scores([tmp_path / "mine.parquet"], tmp_path / "k.parquet", (), distance, best="quality")
        assert [key for _, key in chosen(tmp_path / "k.parquet")] == [*"1236"]
    filter_scores([tmp_path / "mine.parquet"], tmp_path / "k.parquet", top=0.2, by="quality")
    assert [key for _, key in chosen(tmp_path / "k.parquet")] == ["3"]


@pytest.mark.parametrize(
    "formula",
    [
        "(SELECT content FROM read_text('secret.txt')) = 'x'",
        "CAST((SELECT content FROM read_text('secret.txt')) AS INTEGER) > 1",
        "(SELECT count(*) FROM glob('*')) > 0",
        "(SELECT count(*) FROM 'mine.parquet') > 0",
        "(SELECT count(*) FROM secret) > 0",
        "CAST(key AS DATE) > DATE '2020-01-01'",
    ],
)
def test_formulas_see_the_columns_alone(rows, tmp_path, monkeypatch, formula):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("hunter2")
    secret = pa.table({"word": ["hunter2"]})
    parquet.write_table(secret, tmp_path / "mine.parquet")
    for choose_by in ({"where": formula}, {"by": formula, "top": 0.5}):
        with pytest.raises(DataError) as error:
            filter_scores(find_scores([tmp_path / "a"]), tmp_path / "k.parquet", **choose_by)
        assert "hunter2" not in str(error.value)
        assert "000000" not in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError):
        dedup_scores(find_scores([tmp_path / "a"]), tmp_path / "k.parquet", best=formula)
    assert not (tmp_path / "k.parquet").exists()


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("shard", [["a.tar"], ["a.tar"]]),
        ("key", [1, 2]),
        ("embedding", ["1", "2"]),
        ("phash", ["1", "2"]),
    ],
)
def test_columns_of_another_type(tmp_path, column, values):
    columns = {"shard": ["a.tar"] * 2, "key": ["1", "2"], "phash": [1, 2], "similarity": [0.1, 0.2]}
    table = pa.table(columns | {"embedding": [[1.0, 0.0], [0.0, 1.0]]} | {column: values})
    parquet.write_table(table, tmp_path / "mine.parquet")
    with pytest.raises(DataError, match=f" {column} ") as error:
        dedup_scores([tmp_path / "mine.parquet"], tmp_path / "k.parquet", cosine=0.9)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", ["thesis.txt", "0.tar", "table.parquet"])
def test_a_file_of_another_kind_is_not_replaced(rows, tmp_path, name):
    output = tmp_path / name
    output.write_text("three years of work")
    if name == "table.parquet":
        parquet.write_table(pa.table({"shard": ["a.tar"], "key": ["1"]}), output)
    before = output.read_bytes()
    for command in (["filter"], ["dedup"]):
        with pytest.raises(SystemExit, match=name):
            coca_data([*command, str(tmp_path / "a"), f"output={output}"])
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["filter", "where=simlarity > 1"], '"simlarity"'),
        (["filter", "where=true; DROP TABLE scores"], "where='true; DROP TABLE scores'"),
        (["filter", "where=similarity >"], "where='similarity >'"),
        (["filter", "top=0.5"], "by=similarity"),
        (["filter", "top=30", "by=similarity"], "30"),
        (["dedup", "hash-distance=none"], "cosine"),
        (["dedup", "hash-distance=40"], "40"),
        (["dedup", "against=nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_sentence(rows, tmp_path, words, said):
    with pytest.raises(SystemExit) as error:
        coca_data([words[0], str(tmp_path / "a"), f"output={tmp_path / 'k.parquet'}", *words[1:]])
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not [*tmp_path.glob("*k.parquet*")]


@pytest.mark.parametrize("words", ["filter a output=a/{}", "dedup a output=a/../a/{}", "dedup a against=b output=b/{}"])
def test_a_selection_replaces_no_scores(rows, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "b", count=5)
    before = [path.read_bytes() for path in tmp_path.glob("*/*")]
    with pytest.raises(SystemExit, match=r"00000\.scores\.parquet"):
        coca_data(words.format("00000.scores.parquet").split())
    assert [path.read_bytes() for path in tmp_path.glob("*/*")] == before


def test_scores_that_do_not_belong_together(rows, tmp_path):
    write(tmp_path / "b", count=5)
    with pytest.raises(DataError, match=r"00000\.scores\.parquet"):
        find_scores([tmp_path / "a", tmp_path / "b"])
    columns = {"key": ["1"], "similarity": [0.5], "phash": [3]}
    write_scores(tmp_path / "a" / "9.scores.parquet", "9.tar", columns, ABOUT | {"model": "another"})
    with pytest.raises(DataError, match="caption_key"):
        filter_scores(find_scores([tmp_path / "a"]), tmp_path / "k.parquet")
    write_scores(tmp_path / "a" / "9.scores.parquet", "9.tar", columns, ABOUT)
    with pytest.raises(DataError, match="--embeddings"):
        dedup_scores(find_scores([tmp_path / "a"]), tmp_path / "k.parquet", cosine=0.9)


def test_a_folder_with_shards_that_have_no_scores_is_refused(rows, tmp_path):
    (tmp_path / "a" / "new.tar").write_bytes(b"1")
    with pytest.raises(DataError, match=r"1 shards in .*/a have no scores, e\.g\. new\.tar"):
        find_scores([tmp_path / "a"])
    assert find_scores([f"{tmp_path}/a/*.scores.parquet"])


def test_scores_of_a_shard_that_has_changed_since(rows, tmp_path):
    shard = tmp_path / "a" / "00001.tar"
    shard.write_bytes(b"1")
    os.utime(shard, ns=(1, 1))  # as ABOUT says
    filter_scores(find_scores([tmp_path / "a"]), tmp_path / "k.parquet")
    os.utime(shard, ns=(2 * 10**9, 2 * 10**9))
    with pytest.raises(DataError, match=r"00001\.tar has changed since it was scored"):
        dedup_scores(find_scores([tmp_path / "a"]), tmp_path / "k.parquet")


def test_embeddings_of_different_models_are_not_compared(rows, tmp_path):
    write(tmp_path / "b", count=5)
    (other,) = find_scores([tmp_path / "b"])
    columns = {"key": ["1"], "similarity": [0.5], "phash": [3], "embedding": rows[0]["embedding"][None]}
    given = (find_scores([tmp_path / "a"]), tmp_path / "k.parquet", [other])
    write_scores(other, "9.tar", columns, ABOUT | {"caption_key": "json"})
    dedup_scores(*given, cosine=0.9)
    write_scores(other, "9.tar", columns, ABOUT | {"model": "another"})
    with pytest.raises(DataError, match="model or precision"):
        dedup_scores(*given, cosine=0.9)
    dedup_scores(*given, hash_distance=3)  # hashes are of the images alone


def test_names_of_files_are_no_patterns_and_no_sql(rows, tmp_path):
    odd = tmp_path / "it's; DROP TABLE scores"
    (tmp_path / "a").rename(odd)
    filter_scores(find_scores([odd]), odd / "k'.parquet", "words > 4", selection=None)
    assert chosen(odd / "k'.parquet") == names([row for row in rows if row["words"] > 4])
    odd.rename(tmp_path / "[ab]*")
    with pytest.raises(DataError, match=r"\[ab\]"):
        find_scores([tmp_path / "[ab]*"])
