"""Training on a selection is training on copies of the shards that hold the selected samples alone."""

import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pyarrow")
import pyarrow as pa
from pyarrow import parquet

from coca_lit.data.batch import Batch
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.data.shards.selection import Selection, read_selection
from coca_lit.data.shards.shard import Shard
from coca_lit.errors import DataError
from coca_lit.tools.prepare.command import data as coca_data
from helpers.shards import TOKENIZER, write_shards, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four shards of seven samples."""
    folder = tmp_path / "all"
    folder.mkdir()
    write_shards(folder, 4, 7)
    return folder


KEPT = {0: [0, 2, 3], 1: [], 2: [0, 1, 2, 3, 4, 5, 6], 3: [6, 1]}  # of each shard


def rows() -> list[tuple[str, str]]:
    return [(f"{shard:05d}.tar", f"{shard}{i:04d}") for shard, kept in KEPT.items() for i in kept]


def select(path: Path, chosen: list[tuple[str, str]], **more) -> str:
    shards, keys = zip(*chosen, strict=True)
    parquet.write_table(pa.table({"shard": shards, "key": keys}), path, **more)
    return str(path)


def copy(source: Path, target: Path, chosen: list[tuple[str, str]]) -> Path:
    target.mkdir()
    for path in sorted(source.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {info.name: tar.extractfile(info).read() for info in tar}
        kept = {name: data for name, data in files.items() if (path.name, name.partition(".")[0]) in chosen}
        if kept:
            write_tar(target / path.name, kept)
    return target


def batches(tmp_path: Path, shards: Path | list | dict, rank: int = 0, world: int = 1, **more) -> list[Batch]:
    """Those of two epochs."""
    shards = str(shards) if isinstance(shards, Path) else shards
    more = {"epoch_samples": 24, "seed": 3, "image_size": 16, "cache_dir": str(tmp_path / "cache")} | more
    data = LAIONDataModule(shards, tokenizer=TOKENIZER, batch_size=4, **more)
    data.prepare_data()
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
    return [
        batch
        for epoch in (0, 1)
        for batch in islice(data.train_dataloader().batches_from(epoch, 0), data.steps_per_epoch)
    ]


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert [key.rpartition("/")[2] for key in a.keys] == [key.rpartition("/")[2] for key in b.keys]
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.tokens, b.tokens)


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_are_those_of_copied_shards(folder, tmp_path, rank):
    """A row without a key selects nothing."""
    chosen = select(tmp_path / "kept.parquet", [*rows(), ("00000.tar", None)])
    copied = copy(folder, tmp_path / "copied", rows())
    found = batches(tmp_path, folder, rank, 2, selection=chosen)
    assert_equal(found, batches(tmp_path, copied, rank, 2))
    seen = {key.rpartition("/")[2] for batch in found for key in batch.keys}
    assert seen <= {key for _, key in rows()}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_windows_are_those_of_copied_shards_on_any_ranks_and_workers(folder, tmp_path, monkeypatch, workers):
    """Four samples at a time of each of two readers."""
    monkeypatch.setattr("coca_lit.data.shards.laion.AUTO_BYTES", 0)
    chosen, copied = select(tmp_path / "kept.parquet", rows()), copy(folder, tmp_path / "copied", rows())
    windows = {"window": 8, "readers": 2}
    expected = batches(tmp_path, copied, **windows)
    ranks = [batches(tmp_path, folder, rank, 2, selection=chosen, num_workers=workers, **windows) for rank in (0, 1)]
    joined = [
        a._replace(keys=a.keys + b.keys, images=torch.cat([a.images, b.images]), tokens=torch.cat([a.tokens, b.tokens]))
        for a, b in zip(*ranks, strict=True)
    ]
    assert_equal(joined, expected)


def test_samples_are_counted_by_the_selection(folder, tmp_path):
    coca_data(["check", str(folder), "--workers", "1"])  # a manifest, which counts all samples
    data = LAIONDataModule(
        str(folder), None, selection=select(tmp_path / "k.parquet", rows()),
        tokenizer=TOKENIZER, batch_size=4, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    assert data.epoch_samples == len(rows())
    assert [shard.file_name for shard in data.shards[""]] == ["00000.tar", "00002.tar", "00003.tar"]


def test_shards_with_a_selection_are_keys_of_a_dict() -> None:
    selection = Selection(Path("kept.parquet"), "digest", {"0.tar": 3}, {"0.tar": [0]})
    assert {Shard("0.tar", selection=selection): 1}[Shard("0.tar", selection=replace(selection))] == 1


def test_another_selection_is_not_resumed(folder, tmp_path):
    """Neither of the same number of samples, under the same name."""
    path = tmp_path / "k.parquet"

    def data() -> LAIONDataModule:
        others = {"tokenizer": TOKENIZER, "batch_size": 4, "cache_dir": str(tmp_path / "cache")}
        return LAIONDataModule(str(folder), None, selection=select(path, chosen), **others)

    chosen = rows()
    state = data().state_dict()
    data().load_state_dict(state)
    chosen = [*rows()[:-1], ("00003.tar", "30002")]
    with pytest.raises(DataError, match=r"k\.parquet"):
        data().load_state_dict(state)


@pytest.mark.parametrize("more", [{"row_group_size": 3}, {"use_dictionary": False}])
def test_selections_of_any_program(tmp_path, more):
    chosen = rows()[::-1]
    shuffled = chosen[1::2] + chosen[::2]
    found = read_selection(Path(select(tmp_path / "k.parquet", shuffled, **more)))
    assert found.counts == {"00000.tar": 3, "00002.tar": 7, "00003.tar": 2}
    for shard in ("00000.tar", "00001.tar", "00003.tar"):
        assert found.keys(shard) == {key for name, key in chosen if name == shard}


def test_what_does_not_fit_is_one_sentence(folder, tmp_path):
    path = tmp_path / "k.parquet"
    with pytest.raises(DataError, match=r"00000\.tar lacks 1 .* new"):
        batches(tmp_path, folder, selection=select(path, [*rows(), ("00000.tar", "new")]))
    with pytest.raises(DataError, match=r"k\.parquet.* 4 "):
        batches(tmp_path, folder, selection=select(path, [("7.tar", "1")]))
    with pytest.raises(DataError, match=r"1 of the 3 shards of .*k\.parquet are not given, e\.g\. 00002\.tar"):
        batches(tmp_path, str(folder / "{00000,00001,00003}.tar"), selection=select(path, rows()))
    with pytest.raises(ValueError, match=r"selection.*'a'"):
        batches(tmp_path, {"a": str(folder)}, selection=str(path))
    copied = copy(folder, tmp_path / "copied", rows())
    with pytest.raises(DataError, match="same file name"):
        batches(tmp_path, [str(folder), str(copied)], selection=select(path, rows()))
