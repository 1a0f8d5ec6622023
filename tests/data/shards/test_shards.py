"""Shards from strangers: hostile, broken and incomplete ones, and the exact position within an endless stream."""

import io
import json
import logging
import random
import tarfile
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from coca_lit.data.bad_samples import BadSamples
from coca_lit.data.batch import Batch
from coca_lit.data.loader import Schedule
from coca_lit.data.shards.datamodule import LAIONDataModule, usable_workers
from coca_lit.data.shards.listing import Shard, find_shards
from coca_lit.data.shards.mixture import Source
from coca_lit.data.shards.reader import ShardSample, read_shard
from coca_lit.data.shards.stream import ShardBatches, ShardOrder, _shuffled
from coca_lit.data.transforms import RandomCrop
from coca_lit.errors import DataError, DataNotFoundError
from coca_lit.tokenizer import WordTokenizer

TOKENIZER = WordTokenizer(["a", "dog", "number"])


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 18), (shade % 256, 100, 50)).save(buffer, "JPEG")
    return buffer.getvalue()


def members(key: str, shade: int = 0) -> dict[str, bytes]:
    fields = json.dumps({"caption": "from the alt text", "recaption": "a dog", "key": key}).encode()
    return {f"{key}.jpg": jpeg(shade), f"{key}.txt": b" a dog number \n", f"{key}.json": fields}


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, shards: int, per_shard: int) -> list[Path]:
    """Shard s has the keys s0000, s0001, ..."""
    return [
        write_tar(
            folder / f"{s:05d}.tar",
            {name: data for i in range(per_shard) for name, data in members(f"{s}{i:04d}", 7 * i).items()},
        )
        for s in range(shards)
    ]


def local(paths: list[Path]) -> list[Shard]:
    return [Shard(str(path)) for path in paths]


def spoil(path: Path, changes: dict[str, bytes | None]) -> None:
    """Rewrite a shard with some members replaced, or left out where the value is None."""
    with tarfile.open(path) as tar:
        files = {info.name: tar.extractfile(info).read() for info in tar.getmembers()}
    write_tar(path, {name: data for name, data in (files | changes).items() if data is not None})


def read(path: Path, caption_key: str = "txt") -> tuple[list[str], dict[str, int]]:
    bad = BadSamples(1.0)
    keys = [sample.key for sample in read_shard(Shard(str(path)), [caption_key], bad)]
    assert bad.seen == len(keys) + bad.reasons.total()
    return keys, dict(bad.reasons)


def batches(order: ShardOrder, start: int = 0, num_workers: int = 0, max_bad: float = 0.5) -> Iterator[Batch]:
    stream = ShardBatches(order, RandomCrop(16), TOKENIZER, Schedule(1000, 4 * order.world), 0, start, max_bad)
    return iter(DataLoader(stream, batch_size=None, num_workers=num_workers))


def contents(batch: Batch) -> tuple:
    return batch.keys, batch.tokens.tolist(), batch.images.tolist()


# --- which shards


def test_find_shards(tmp_path):
    paths = write_shards(tmp_path, 3, 1)
    assert find_shards(f"{tmp_path}/{{00000..00002}}.tar") == local(paths)
    assert find_shards(f"{tmp_path}/*.tar") == local(paths)
    assert find_shards(f"file://{tmp_path}/0000[12].tar") == local(paths[1:])
    assert find_shards([str(paths[2]), f"{tmp_path}/*.tar"]) == local([paths[2], *paths[:2]])


@pytest.mark.parametrize("folder", ["laion [v2]", "laion {v2,v3}", "laion {v2"])
def test_names_with_brackets_and_braces(tmp_path, folder):
    (tmp_path / folder).mkdir()
    paths = [str(path) for path in write_shards(tmp_path / folder, 2, 1)]
    assert [shard.name for shard in find_shards(str(tmp_path / folder))] == paths
    assert [shard.name for shard in find_shards(paths)] == paths


def test_patterns_in_a_folder_with_brackets(tmp_path):
    folder = tmp_path / "laion [v2]"
    folder.mkdir()
    paths = [str(path) for path in write_shards(folder, 2, 1)]
    for pattern in ("*.tar", "0000?.tar", "{00000..00001}.tar"):
        assert [shard.name for shard in find_shards(f"{folder}/{pattern}")] == paths
    with pytest.raises(DataNotFoundError, match=r"1 of 3 shards not found .*00002\.tar"):
        find_shards(f"{folder}/{{00000..00002}}.tar")


def test_a_brace_without_its_partner(tmp_path):
    with pytest.raises(DataError, match=r"00001\.tar' is not a range of shards like .*: a brace lacks its partner"):
        find_shards(f"{tmp_path}/{{00000..00001.tar")


def test_missing_shards_are_named(tmp_path):
    write_shards(tmp_path, 2, 1)
    with pytest.raises(DataNotFoundError, match=r"1 of 3 shards not found .*00002\.tar"):
        find_shards(f"{tmp_path}/{{00000..00002}}.tar")
    with pytest.raises(DataNotFoundError, match=r"shards not found .*nothing-\*\.tar"):
        find_shards(f"{tmp_path}/nothing-*.tar")


# --- what is in them


def test_read_shard(tmp_path):
    (path,) = write_shards(tmp_path, 1, 2)
    sample, _ = read_shard(Shard(str(path)), ["txt"], BadSamples(0))
    assert sample == ("00000", jpeg(0), {"txt": ("a dog number",)}, str(path))
    assert [s.captions for s in read_shard(Shard(str(path)), ["recaption"], BadSamples(0))] == [
        {"recaption": ("a dog",)}
    ] * 2
    assert read(path, "nothing") == ([], {"no caption in the JSON under nothing": 2})


def test_incomplete_samples_are_counted_by_reason(tmp_path):
    (path,) = write_shards(tmp_path, 1, 6)
    spoil(path, {"00001.txt": None, "00002.txt": b" \n", "00003.jpg": None})
    assert read(path) == (["00000", "00004", "00005"], {"missing caption": 2, "missing image": 1})


def test_truncated_and_foreign_shards_are_counted(tmp_path):
    (path,) = write_shards(tmp_path, 1, 6)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        info = tar.getmember("00003.jpg")
    for cut in (info.offset_data + 10, info.offset + 100, info.offset):  # in a member, in a header, between members
        path.write_bytes(whole[:cut])
        keys, reasons = read(path)
        assert set(keys) <= {"00000", "00001", "00002"}
        assert len(keys) >= 2
        assert reasons == {"broken or truncated shard": 1}
    for junk in (b"", b"not a tar" * 500):
        path.write_bytes(junk)
        assert read(path) == ([], {"broken or truncated shard": 1})


def test_unreadable_images_are_replaced_and_batches_stay_full(tmp_path, caplog):
    paths = write_shards(tmp_path, 2, 12)
    spoil(paths[0], {"00005.jpg": jpeg(3)[:200], "00006.jpg": b"junk"})
    stream = batches(ShardOrder([Source("", local(paths))], seed=1))
    first_pass = list(islice(stream, 6))  # 24 samples
    assert {len(batch.keys) for batch in first_pass} == {4}
    assert all(len(set(batch.keys)) == 4 for batch in first_pass)
    seen = {key.rpartition("/")[2] for batch in first_pass for key in batch.keys}  # SHARD/KEY
    assert seen == {f"{s}{i:04d}" for s in range(2) for i in range(12)} - {"00005", "00006"}
    assert f"unreadable image; most in {paths[0]} (2)" in caplog.text


def test_too_many_bad_samples_stop_the_run_with_counts_and_shards(tmp_path):
    paths = write_shards(tmp_path, 2, 10)
    spoil(paths[1], {"10002.jpg": b"junk", "10003.txt": None})
    stream = batches(ShardOrder([Source("", local(paths))]), max_bad=0.05)
    with pytest.raises(
        DataError, match=r"max_bad_fraction=0\.05 allows: 2 of 20 samples .*1 x .*most in .*/00001\.tar \(2\)"
    ):
        list(islice(stream, 20))  # judged at the end of the pass
    list(islice(batches(ShardOrder([Source("", local(paths))]), max_bad=0.1), 20))


def test_the_message_surfaces_from_a_worker(tmp_path):
    paths = write_shards(tmp_path, 2, 4)
    for path in paths:
        spoil(path, {f"{path.stem[-1]}{i:04d}.jpg": b"junk" for i in range(4)})
    stream = batches(ShardOrder([Source("", local(paths))]), num_workers=2, max_bad=1.0)
    with pytest.raises(DataError, match=r"no usable sample: 4 of 4 samples \(4 x unreadable image") as error:
        next(stream)
    traceback.clear_frames(error.tb)
    del stream  # else the garbage collector finds it in a cycle, and torch then waits 5 s for each worker


def test_bad_samples_are_judged_after_enough_were_seen():
    bad = BadSamples(0.05)
    for seen in range(1, 200):
        bad.seen = seen
        bad.add("missing caption", "x.tar")  # 100 % bad, but too early to say
    bad.seen = 200
    with pytest.raises(DataError, match="200 of 200 samples"):
        bad.add("missing caption", "x.tar")
    with pytest.raises(ValueError, match="between 0 and 1, not 5"):
        BadSamples(5)


def test_a_bad_sample_in_place_of_another_is_counted_once(tmp_path):
    (path,) = write_shards(tmp_path, 1, 12)
    spoil(path, {"00001.jpg": b"junk", "00004.jpg": b"junk"})  # the second is the first one's replacement, and bad
    stream = batches(ShardOrder([Source("", local([path]))], shuffle_buffer=1))
    found = list(islice(stream, 3))
    assert [[bad.key for bad in batch.bad] for batch in found] == [["00001"], ["00004"], []]
    assert [key.rpartition("/")[2] for key in found[0].keys] == ["00000", "00002", "00003", "00005"]


def test_the_shuffle_buffer_is_bounded_in_bytes(tmp_path):
    drawn = []

    def samples(sizes: list[int]) -> Iterator[ShardSample]:
        for i, size in enumerate(sizes):
            drawn.append(size)
            yield ShardSample(str(i), bytes(size), {"txt": ("a",)}, "x.tar")

    rng = random.Random(0)
    sizes = [rng.choice([10, 1000, 5000, 30_000]) for _ in range(300)]
    given = []
    for sample in _shuffled(samples(sizes), 50, 20_000, random.Random(1)):
        given.append(sample)
        assert sum(drawn) - sum(len(s.image) for s in given) <= 20_000 + 30_000  # the buffer, and the newest sample
    assert sorted(int(sample.key) for sample in given) == list(range(300))
    assert [sample.key for sample in given] != [str(i) for i in range(300)]
    wide = [s.key for s in _shuffled(samples(sizes), 50, 10**9, random.Random(1))]
    assert wide == [s.key for s in _by_count(samples(sizes), 50, random.Random(1))]


def test_the_open_shards_and_the_buffer_take_no_more_memory_than_they_may(tmp_path, monkeypatch):
    image = random.Random(0).randbytes(200_000)
    for shard in range(6):
        names = [f"{shard}{i}.{suffix}" for i in range(12) for suffix in ("jpg", "txt")]
        write_tar(tmp_path / f"{shard}.tar", {name: image if name.endswith("jpg") else b"a" for name in names})
    monkeypatch.setattr("coca_lit.data.shards.stream.MAX_BUFFER", 2_000_000)
    order = ShardOrder([Source("", find_shards(f"{tmp_path}/*.tar"))], open_shards=4)
    samples = order.samples(0, 0, 1, BadSamples(0))
    tracemalloc.start()
    seen = Counter(next(samples).sample.shard for _ in range(72))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [*seen.values()] == [12] * 6
    assert 2_000_000 < peak < 2_000_000 + (2 * 4 + 2) * 200_000 + 300_000  # an open shard has read up to two images


def test_several_shards_are_read_at_a_time(tmp_path):
    paths = write_shards(tmp_path, 6, 20)
    order = ShardOrder([Source("", local(paths))], shuffle_buffer=1, open_shards=3)
    keys = [sample.key for *_, sample in islice(order.samples(0, 0, 1, BadSamples(0)), 120)]
    assert sorted(keys) == sorted(f"{s}{i:04d}" for s in range(6) for i in range(20))
    assert len({key[0] for key in keys[:20]}) == 3
    for shard in range(6):  # each in its own order
        own = [key for key in keys if key[0] == str(shard)]
        assert own == sorted(own)


def _by_count(samples: Iterator[ShardSample], size: int, rng: random.Random) -> Iterator[ShardSample]:
    """A buffer of a fixed number of samples."""
    buffer = list(islice(samples, size))
    for sample in samples:
        i = rng.randrange(size)
        yield buffer[i]
        buffer[i] = sample
    rng.shuffle(buffer)
    yield from buffer


# --- order and position


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 3))])
def test_a_resumed_stream_continues_with_the_same_batches(tmp_path, num_workers):
    paths = write_shards(tmp_path, 7, 9)
    spoil(paths[0], {"00001.jpg": b"junk", "00004.txt": None})  # bad samples must not shift the position
    spoil(paths[3], {"30002.jpg": b"junk"})
    paths[5].write_bytes(paths[5].read_bytes()[:9000])
    order = ShardOrder([Source("", local(paths))], seed=2, shuffle_buffer=5)
    whole = [contents(batch) for batch in islice(batches(order, 0, num_workers), 40)]  # more than two passes
    for start in (1, 2, 5, 23):
        resumed = islice(batches(order, start, num_workers), 40 - start)
        assert [contents(batch) for batch in resumed] == whole[start:]


def test_ranks_and_workers_share_out_the_shards(tmp_path):
    paths = write_shards(tmp_path, 5, 6)
    keys = []
    for rank in range(2):
        for worker in range(2):
            order = ShardOrder([Source("", local(paths))], rank=rank, world=2)
            bad = BadSamples(0)
            samples = list(islice(order.samples(0, worker, 2, bad), 24))
            keys += [sample.key for _, turn, sample in samples if turn == 0]
    assert sorted(keys) == sorted(f"{s}{i:04d}" for s in range(5) for i in range(6))


def test_order_and_crops_change_with_epoch_pass_and_seed(tmp_path):
    paths = write_shards(tmp_path, 2, 10)

    def keys(seed: int, epoch: int) -> list[str]:
        order = ShardOrder([Source("", local(paths))], seed=seed)
        return [sample.key for *_, sample in islice(order.samples(epoch, 0, 1, BadSamples(0)), 40)]

    first = keys(0, 0)
    assert sorted(first[:20]) == sorted(first[20:])
    assert first[:20] != first[20:]
    assert first != keys(0, 1)
    assert first != keys(1, 0)
    assert first == keys(0, 0)
    assert {key[0] for key in first[:5]} == {"0", "1"}  # the buffer mixes shards


def test_each_process_needs_a_shard(caplog):
    with pytest.raises(DataError, match="3 shards cannot feed 4 processes"):
        usable_workers(Source("", [Shard("x.tar")] * 3), world=4, num_workers=0)
    with caplog.at_level(logging.WARNING):
        assert usable_workers(Source("", [Shard("x.tar")] * 5), world=2, num_workers=4) == 2
    assert "5 shards for 2 processes: using 2 workers each, not 4" in caplog.text
    assert usable_workers(Source("", [Shard("x.tar")] * 8), world=2, num_workers=4) == 4


def test_laion_data(tmp_path):
    write_shards(tmp_path, 2, 10)
    data = LAIONDataModule(
        f"{tmp_path}/*.tar", 12, tokenizer=TOKENIZER, batch_size=4, image_size=16, caption_keys="recaption"
    )
    loader = data.train_dataloader()
    assert len(loader) == data.steps_per_epoch == len(list(loader)) == 3
    batch = next(iter(loader))
    assert (batch.images.shape, batch.images.dtype) == ((4, 3, 16, 16), torch.uint8)
    assert batch.tokens.tolist() == [TOKENIZER.encode("a dog")] * 4
    assert data.val_dataloader() == []
    with pytest.raises(DataError, match="epoch_samples 3 is less than one batch of 4"):
        LAIONDataModule(f"{tmp_path}/*.tar", 3, tokenizer=TOKENIZER, batch_size=4).train_dataloader()
