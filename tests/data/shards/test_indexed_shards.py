"""Indexed shards: the order of map-style data on any ranks and workers, and the faults of reading in tar order."""

import errno
import json
import os
import tarfile
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from coca_lit.cli.train import resume_data
from coca_lit.data.bad_samples import BadSamples
from coca_lit.data.batch import Batch
from coca_lit.data.loader import Schedule
from coca_lit.data.mixture import counts_after, weighted_round_robin
from coca_lit.data.shards import index as indexing
from coca_lit.data.shards.index import TarIndex, load_index, make_index, tar_indexes
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.data.shards.listing import find_shards
from coca_lit.data.shards.scan import read_shard
from coca_lit.data.shards.shard import ManifestEntry, Shard, sha256_of, write_manifest
from coca_lit.data.shards.tar import tar_members
from coca_lit.errors import DataError
from coca_lit.runs.resume import ResumePoint
from helpers.epochs import epoch_batches
from helpers.forking import FORKSERVER
from helpers.fuzzing import fuzz
from helpers.shards import TOKENIZER, contents, members, spoil, write_shards, write_tar

REASONS = {True: "unreadable shard", False: "shard changed after it was indexed"}
KEYS = [f"{shard}{i:04d}" for shard in range(3) for i in range(7)]  # in the order of the shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of seven samples; nothing changes them."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, 3, 7)
    return folder


def laion(shards: Path | str | dict[str, str], tmp_path: Path, samples: int | None = None, **more) -> LAIONDataModule:
    more = {"image_size": 16, "seed": 3, "cache_dir": str(tmp_path / "cache")} | more
    return LAIONDataModule(
        shards if isinstance(shards, dict) else str(shards), samples, tokenizer=TOKENIZER, batch_size=4, **more
    )


def batches(data: LAIONDataModule, epoch: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> list[Batch]:
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
    return list(data.train_dataloader().batches_from(epoch, start))


def keys(found: list[Batch]) -> list[list[str]]:
    return [[key.rpartition("/")[2] for key in batch.keys] for batch in found]


# Order and position


def test_the_order_is_that_of_map_style_data(folder, tmp_path):
    data = laion(folder, tmp_path)
    assert data.steps_per_epoch == 21 // 4
    for epoch in (0, 1, 5):
        expected = [
            [KEYS[index.i] for index in batch] for batch in epoch_batches(21, Schedule(21, 4), seed=3, epoch=epoch)
        ]
        assert keys(batches(data, epoch)) == expected


@pytest.mark.parametrize("samples", [8, 48])
def test_epochs_of_any_length_are_cut_from_whole_passes(folder, tmp_path, samples):
    data = laion(folder, tmp_path, samples)
    found = list(chain(*(keys(batches(data, epoch)) for epoch in range(80 // samples))))
    passes = list(chain(*(epoch_batches(21, Schedule(21, 4), seed=3, epoch=turn) for turn in range(4))))
    assert found == [[KEYS[index.i] for index in batch] for batch in passes][: len(found)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_goes_on_with_the_same_bits(folder, tmp_path, workers):
    data = laion(folder, tmp_path, 36, num_workers=workers, caption_keys={"txt": 0.5, "recaption": 0.5})
    whole = [contents(batch) for batch in batches(laion(folder, tmp_path, 36, caption_keys=data.caption_keys), 1)]
    assert len(whole) == 9
    for start in (0, 4, 8):
        assert [contents(batch) for batch in batches(data, 1, start)] == whole[start:]


def test_two_ranks_share_the_batches_of_one(folder, tmp_path):
    alone = batches(laion(folder, tmp_path))
    ranks = [batches(laion(folder, tmp_path), rank=rank, world=2) for rank in range(2)]
    for batch, *parts in zip(alone, *ranks, strict=True):
        assert [key for pair in zip(*(part.keys for part in parts), strict=True) for key in pair] == batch.keys
        assert torch.equal(torch.stack([part.images for part in parts], dim=1).flatten(0, 1), batch.images)
    with pytest.raises(DataError, match=r"batch_size 4 .* 3 "):
        batches(laion(folder, tmp_path), world=3)


def test_fewer_samples_than_a_batch_come_again(folder, tmp_path):
    assert keys(batches(laion(folder / "00000.tar", tmp_path, 28)))  # 7 samples, batches of 4
    data = laion(write_tar(tmp_path / "x.tar", members("a") | members("b", 9)), tmp_path, 8)
    assert Counter(chain(*keys(batches(data)))) == {"a": 4, "b": 4}


# Mixtures


@fuzz
@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=7))
def test_shares_are_where_the_turns_lead_to(weights):
    given = [0] * len(weights)
    for n, (i, before) in zip(range(400), weighted_round_robin(weights, given), strict=False):
        assert (counts_after(n, weights), before) == (given, given[i])
        given[i] += 1
    assert sum(counts_after(10**12 + 7, weights)) == 10**12 + 7


def test_a_mixture_keeps_its_shares_and_goes_through_each_source(folder, tmp_path):
    write_shards(tmp_path, 2, 3)
    sources = {"a": str(folder), "b": str(tmp_path)}
    data = laion(sources, tmp_path, 24, weights={"a": 3, "b": 1})
    found = [batch for epoch in range(4) for batch in batches(data, epoch)]
    assert [Counter(batch.extras["source"]) for batch in found] == [{"a": 3, "b": 1}] * 24
    drawn = [
        key for batch in found for key, source in zip(batch.keys, batch.extras["source"], strict=True) if source == "b"
    ]
    for start in range(0, 24, 6):
        assert len(set(drawn[start : start + 6])) == 6
    assert drawn[:6] != drawn[6:12]
    resumed = batches(data, 2, 3)
    assert [contents(batch) for batch in resumed] == [contents(batch) for batch in found[15:18]]
    assert laion(sources, tmp_path).sources[1].weight == 6  # without weights, by the number of samples


# Faults


def test_the_faults_are_those_of_reading_in_tar_order(tmp_path, caplog):
    paths = write_shards(tmp_path, 4, 6)
    spoil(paths[0], {"00001.txt": None, "00002.jpg": None, "00003.jpg": b"junk", "x.py": b"import os"})
    paths[1].write_bytes(paths[1].read_bytes()[:4000])
    write_tar(paths[2], {})
    in_order, bad = [], BadSamples(1.0)
    for path in paths:
        in_order += [record.id for record in read_shard(Shard(str(path)), ["txt"], bad)]
    data = laion(tmp_path, tmp_path, 400, max_bad_fraction=0.6)
    found = batches(data)
    assert {len(batch.keys) for batch in found} == {4}
    assert set(chain(*keys(found))) == set(in_order) - {"00003"}
    expected = {(sample.shard, sample.key, sample.reason) for sample in bad.found}
    unreadable = (str(paths[0]), "00003", "unreadable image")
    assert {(b.shard, b.key, b.reason) for batch in found for b in batch.bad} == expected | {unreadable}
    assert f"{bad.reasons['broken or truncated shard']} x broken or truncated shard" in caplog.text
    with pytest.raises(DataError, match=r"max_bad_fraction=0\.1.*truncated shard"):
        laion(tmp_path, tmp_path, max_bad_fraction=0.1).prepare_data()


@pytest.mark.parametrize("what", ["vanishes", "grows", "is written again"])
def test_what_happens_to_a_shard_during_the_training_is_counted(tmp_path, what):
    """One that grows keeps its time, one that is written again its size."""
    path, *_ = write_shards(tmp_path, 4, 50)
    data = laion(tmp_path, tmp_path, max_bad_fraction=0.5)
    whole, before = keys(batches(data)), path.stat()
    if what == "vanishes":
        path.unlink()
    elif what == "grows":
        path.write_bytes(path.read_bytes() + bytes(512))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    found = batches(data)
    lost = {sample.key: sample.reason for batch in found for sample in batch.bad}
    assert lost == dict.fromkeys((f"0{i:04d}" for i in range(50)), REASONS[what == "vanishes"])
    assert all(set(a) - lost.keys() <= set(b) for a, b in zip(whole, keys(found), strict=True))
    for other in tmp_path.glob("*.tar"):
        other.unlink()
    with pytest.raises(DataError, match=r"too many bad samples|no usable image in 100 tries"):
        batches(data)


# The index


def test_an_index_says_what_tarfile_says(tmp_path):
    others = {"b.PNG": b"p" * 700, "b.txt": b"t", "b.mp3": b"no", "c.json": b"{}", "c.webm": b"c"}
    path = write_tar(tmp_path / "x.tar", members("a") | others)
    index = make_index(Shard(str(path)), tmp_path)
    assert [index.key(i) for i in range(len(index))] == ["a", "b", "c"]
    with tarfile.open(path) as tar:
        found = {member.name: [member.offset_data, member.size] for member in tar}
    nothing = [0, 0]
    assert index.places.tolist() == [
        [found["a.jpg"], found["a.txt"], found["a.json"], nothing],
        [found["b.PNG"], found["b.txt"], nothing, nothing],
        [nothing, nothing, found["c.json"], found["c.webm"]],
    ]
    assert index.read(1) == {"__key__": "b", "jpg": b"p" * 700, "txt": b"t"}


@fuzz
@given(cuts=st.lists(st.integers(0, 9), max_size=4).map(sorted), gaps=st.booleans())
def test_however_samples_are_split_among_shards_they_are_the_same(tmp_path_factory, cuts, gaps):
    """Also where some have no caption, and some shards no sample."""
    folder = tmp_path_factory.mktemp("split")
    samples = [members(f"{i}", i) for i in range(9)]
    if gaps:
        del samples[4]["4.txt"]
    for number, (start, end) in enumerate(pairwise([0, *cuts, 9])):
        write_tar(folder / f"{number}.tar", {name: data for part in samples[start:end] for name, data in part.items()})
    indexes = tar_indexes(find_shards(str(folder)), folder / "cache")
    found = [index.read(i) for index in indexes for i in range(len(index))]
    assert found == [
        {"__key__": f"{i}"} | {name[2:]: data for name, data in part.items()} for i, part in enumerate(samples)
    ]


def test_an_index_is_made_once_for_each_state_of_a_shard(tmp_path, monkeypatch):
    shards = [Shard(str(path)) for path in write_shards(tmp_path, 2, 2)]
    first = tar_indexes(shards, tmp_path / "cache")
    assert (tmp_path / ".00000.tar.index").is_file()
    made = []

    def noted(shard: Shard, fallback_dir: Path) -> TarIndex:
        made.append(shard)
        return make_index(shard, fallback_dir)

    monkeypatch.setattr(indexing, "make_index", noted)
    again = tar_indexes(shards, tmp_path / "cache")
    assert not made
    assert [(index.keys.tolist(), index.places.tolist()) for index in again] == [
        (index.keys.tolist(), index.places.tolist()) for index in first
    ]
    spoil(tmp_path / "00001.tar", {"10000.jpg": None})
    os.utime(tmp_path / "00001.tar", ns=(0, 12345))
    tar_indexes(shards, tmp_path / "cache")
    assert made == [shards[1]]


@pytest.mark.slow
def test_several_processes_make_the_indexes_of_one(folder, tmp_path, monkeypatch):
    write_shards(tmp_path, 3, 7)
    started = []
    monkeypatch.setattr(indexing, "PER_PROCESS", 1)
    monkeypatch.setattr(indexing, "processors", lambda: 2)
    monkeypatch.setattr(indexing, "get_context", lambda method: started.append(method) or FORKSERVER)
    made = tar_indexes(find_shards(str(tmp_path)), tmp_path / "cache")
    assert started == ["spawn"]
    expected = tar_indexes(find_shards(str(folder)), tmp_path / "cache")
    assert [index.shard.file_name for index in made] == ["00000.tar", "00001.tar", "00002.tar"]
    for index, other in zip(made, expected, strict=True):
        assert (index.keys.tolist(), index.places.tolist()) == (other.keys.tolist(), other.places.tolist())


def test_what_may_be_read_another_time_is_not_kept_as_broken(tmp_path, monkeypatch):
    shard, faults = Shard(str(write_shards(tmp_path, 1, 5)[0])), [OSError(errno.EIO, "Input/output error")]

    def failing(*given):
        for i, member in enumerate(tar_members(*given)):
            if i == 7 and faults:
                raise faults.pop()
            yield member

    monkeypatch.setattr("coca_lit.data.shards.scan.tar_members", failing)
    with pytest.raises(DataError, match=r"00000\.tar could not be read .*Input/output error.*: start again"):
        tar_indexes([shard], tmp_path)
    for _ in range(2):
        (index,) = tar_indexes([shard], tmp_path)
        assert (len(index), index.faults) == (5, [])


def test_a_run_goes_on_with_the_shards_that_it_began_with(folder, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    write_shards(tmp_path / "more", 1, 2)
    sources = {"a": str(folder), "b": str(tmp_path / "more")}
    before = laion(sources, tmp_path)
    start = ResumePoint(tmp_path / "step_1.ckpt", {"LAIONDataModule": before.state_dict()})
    resume_data(laion(sources, tmp_path, num_workers=2), start, strict=True)
    resume_data(
        laion(sources, tmp_path), ResumePoint(start.path, {"LAIONDataModule": {}}), strict=True
    )  # of older versions
    write_shards(tmp_path / "more", 2, 2)
    changed = "the run began with 1 shards and 2 samples of 'b', and now there are 2 shards and 4 samples"
    with pytest.raises(DataError, match=rf"^{changed}: restore them, .* ckpt_path={start.path} "):
        resume_data(laion(sources, tmp_path), start, strict=True)
    resume_data(laion(sources, tmp_path), start, strict=False)
    assert capsys.readouterr().out == f"note: {changed}\n"


@pytest.mark.parametrize("manifest", [False, True])
def test_a_shard_that_was_replaced_is_noted(tmp_path, capsys, manifest):
    (path,) = write_shards(tmp_path, 1, 4)
    if manifest:
        write_manifest(tmp_path, {path.name: ManifestEntry(4, path.stat().st_size, sha256_of(path))})
    start = ResumePoint(tmp_path / "step_1.ckpt", {"LAIONDataModule": laion(tmp_path, tmp_path).state_dict()})
    resume_data(laion(tmp_path, tmp_path), start, strict=True)
    assert not capsys.readouterr().out
    os.utime(path, (1, 1))  # of a copy with the same content, which a manifest shows
    resume_data(laion(tmp_path, tmp_path), start, strict=True)
    said = "note: shards have another size or time than when the run began; a manifest.json tells a change from a copy"
    assert capsys.readouterr().out == ("" if manifest else f"{said}\n")


def test_a_folder_that_cannot_be_written_has_its_indexes_in_the_cache(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write_shards(tmp_path / "data", 1, 4)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    data = laion(tmp_path / "data", tmp_path)
    assert len(batches(data)) == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["00000.tar"]
    assert len([*(tmp_path / "cache" / "indexes").glob("*-00000.tar.index")]) == 1


def test_an_index_from_a_stranger_is_not_believed(tmp_path):
    shard = Shard(str(write_shards(tmp_path, 1, 3)[0]))
    index = make_index(shard, tmp_path)
    path = tmp_path / ".00000.tar.index"
    with safe_open(path, framework="np") as found:
        content = {name: found.get_tensor(name) for name in found.keys()} | found.metadata()  # noqa: SIM118
    about, good = content.pop("about"), content["places"]
    for changes in (
        *({"places": places} for places in (good + 10**6, -good, good[:2], good * 1.0)),
        {"key_ends": content["key_ends"][:2]},
        {"keys": content["keys"] | 0x80},
        {"keys": content["keys"] & 1},
    ):
        save_file(content | changes, path, {"about": about})
        assert load_index(shard, tmp_path) is None
    stamp, faults, kinds = json.loads(about)
    fault = json.dumps([stamp, [["a", 7, {}]], kinds])
    for wrong in ("", "[", "{}", "7", "[[1],[]]", "[" * 10_000, fault, "1" * 10_000):
        save_file(content, path, {"about": wrong})
        assert load_index(shard, tmp_path) is None
    save_file(content, path, {"about": json.dumps([stamp, faults, [*kinds, ["gif"]]])})  # of another kind of input
    assert load_index(shard, tmp_path) is None
    for fine in ([stamp, faults, kinds], [stamp, [["x.tar", "key", "code in a shard"]], kinds]):
        save_file(content, path, {"about": json.dumps(fine)})
        assert load_index(shard, tmp_path)
    for junk in (b"", b"junk", path.read_bytes()[:-50]):
        path.write_bytes(junk)
        assert load_index(shard, tmp_path) is None
    assert tar_indexes([shard], tmp_path)[0].places.tolist() == index.places.tolist()
