"""`coca-data filter` and `coca-data dedup` select what a loop over all samples, and all pairs of them, would select."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from coca_lit.cli.data import data as coca_data
from coca_lit.data.curate import choose
from coca_lit.data.curate.choose import dedup_scores, filter_scores
from coca_lit.data.curate.scores import find_scores, write_scores
from coca_lit.errors import DataError

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


def test_choices_are_made_one_after_the_other(rows, tmp_path):
    scores, first, second = find_scores([tmp_path / "a"]), tmp_path / "1.parquet", tmp_path / "2.parquet"
    filter_scores(scores, first, "words > 4")
    filter_scores(scores, second, "similarity > 0.25", selection=first)
    assert chosen(second) == names([r for r in rows if r["words"] > 4 and r["similarity"] > np.float32(0.25)])
    dedup_scores(scores, second, selection=first)
    assert set(chosen(second)) < set(chosen(first))


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
    words = ["" if distance is None else str(distance) or "", cosine]
    more = [] if cosine is None else [f"cosine={cosine}"]
    coca_data(["dedup", str(tmp_path / "a"), f"output={output}", f"hash_distance={words[0] or 'none'}", *more])
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


def test_embeddings_of_nothing(rows, tmp_path):
    scores = find_scores([tmp_path / "a"])
    assert dedup_scores(scores, tmp_path / "k.parquet", scores, cosine=0.9).kept == 0
    filter_scores(scores, tmp_path / "none.parquet", "words > 100")
    assert dedup_scores(scores, tmp_path / "k.parquet", cosine=0.9, selection=tmp_path / "none.parquet").kept == 0


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


def test_scores_that_other_programs_wrote(tmp_path):
    table = pa.table({"shard": ["b.tar", "a.tar"], "key": ["2", "1"], "aesthetic": [5.0, 6.0]})
    parquet.write_table(table, tmp_path / "mine.parquet")
    filter_scores(find_scores([tmp_path / "mine.parquet"]), tmp_path / "k.parquet", "aesthetic > 4")
    assert chosen(tmp_path / "k.parquet") == [("a.tar", "1"), ("b.tar", "2")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["filter", "where=simlarity > 1"], 'column "simlarity" not found'),
        (["filter", "where=true; DROP TABLE scores"], "where='true; DROP TABLE scores' is not a formula in SQL"),
        (["filter", "where=similarity >"], "is not a formula in SQL"),
        (["filter", "top=0.5"], "the best samples need both a share and a score"),
        (["filter", "top=30", "by=similarity"], "top must be a share above 0 and up to 1, not 30"),
        (["dedup", "hash-distance=none"], "found by hash_distance, by cosine or by both"),
        (["dedup", "hash-distance=40"], "between 0 and 15 of 64 bits, not 40"),
        (["dedup", "against=nowhere"], "no scores at nowhere: write them with coca-data score"),
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
    with pytest.raises(SystemExit, match="holds scores, which the selection would replace: choose another output"):
        coca_data(words.format("00000.scores.parquet").split())
    assert [path.read_bytes() for path in tmp_path.glob("*/*")] == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["dedup", "a", "output=k.parquet", "hash-distance=x"],
            "--hash-distance: must be a number of bits or none, not",
        ),
        (["check", "a", "workers=x"], "--workers: must be a whole number of at least 1, not 'x'"),
        (["check", "a", "workers=0"], "--workers: must be a whole number of at least 1, not '0'"),
    ],
)
def test_words_that_are_no_numbers(words, said, capsys):
    with pytest.raises(SystemExit):
        coca_data(words)
    assert said in capsys.readouterr().err


def test_scores_that_do_not_belong_together(rows, tmp_path):
    write(tmp_path / "b", count=5)
    with pytest.raises(DataError, match="are about shards of the same name: choose from one set at a time"):
        find_scores([tmp_path / "a", tmp_path / "b"])
    columns = {"key": ["1"], "similarity": [0.5], "phash": [3]}
    write_scores(tmp_path / "a" / "9.scores.parquet", "9.tar", columns, ABOUT | {"model": "another"})
    with pytest.raises(DataError, match="were scored with a different model or precision or caption_key: score"):
        filter_scores(find_scores([tmp_path / "a"]), tmp_path / "k.parquet")
    write_scores(tmp_path / "a" / "9.scores.parquet", "9.tar", columns, ABOUT)
    with pytest.raises(DataError, match="some samples have no embedding: score them with --embeddings"):
        dedup_scores(find_scores([tmp_path / "a"]), tmp_path / "k.parquet", cosine=0.9)


def test_embeddings_of_different_models_are_not_compared(rows, tmp_path):
    write(tmp_path / "b", count=5)
    (other,) = find_scores([tmp_path / "b"])
    columns = {"key": ["1"], "similarity": [0.5], "phash": [3], "embedding": rows[0]["embedding"][None]}
    given = (find_scores([tmp_path / "a"]), tmp_path / "k.parquet", [other])
    write_scores(other, "9.tar", columns, ABOUT | {"caption_key": "json"})
    dedup_scores(*given, cosine=0.9)
    write_scores(other, "9.tar", columns, ABOUT | {"model": "another"})
    with pytest.raises(
        DataError, match="were scored with a different model or precision: score both with the same settings"
    ):
        dedup_scores(*given, cosine=0.9)
    dedup_scores(*given, hash_distance=3)  # hashes are of the images alone


def test_names_of_files_are_no_patterns_and_no_sql(rows, tmp_path):
    odd = tmp_path / "it's; DROP TABLE scores"
    (tmp_path / "a").rename(odd)
    filter_scores(find_scores([odd]), odd / "k'.parquet", "words > 4", selection=None)
    assert chosen(odd / "k'.parquet") == names([row for row in rows if row["words"] > 4])
    odd.rename(tmp_path / "[ab]*")
    with pytest.raises(DataError, match="could be a pattern of paths to DuckDB: rename it without"):
        find_scores([tmp_path / "[ab]*"])
