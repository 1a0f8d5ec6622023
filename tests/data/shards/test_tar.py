"""Tars: what one reader refuses for training and recaptioning alike, and what the writer writes."""

import random
import tarfile
import time
from pathlib import Path

import pytest
from webdataset.tariterators import base_plus_ext

from coca_lit.data.shards.tar import Member, group_members, tar_members, tar_writer
from coca_lit.tools.caption.inputs import open_shard, write_shard
from helpers.shards import jpeg, members, read, write_shards, write_tar


def sparse(name: str, stored: bytes, claimed: int) -> bytes:
    """An old GNU sparse member: `stored` at the start of `claimed` bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(stored), tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, len(stored))
    header[483:495] = b"%011o\0" % claimed
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + stored + bytes(-len(stored) % 512)


def good_and(path: Path, bad: bytes) -> Path:
    """Three good samples, of which the last is not known to be complete, then what `bad` holds."""
    write_tar(path, {name: data for i in range(3) for name, data in members(str(i)).items()})
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content + bytes(-len(content) % 512) + bad + bytes(10240))
    return path


def header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("bad", "reason", "captioned"),
    [
        (sparse("9.jpg", bytes(512), 100 * 2**20), "is sparse", ["0", "1"]),
        (header("9.jpg", 2**40), "claims 1,099,511,627,776 bytes", ["0", "1"]),
        (header("../9.jpg", 0), "leads out of the shard", ["0", "1", "2"]),
        (header("/9.jpg", 0), "leads out of the shard", ["0", "1", "2"]),
        (header("9.jpg", -512), "claims -512 bytes, not 0 to", ["0", "1"]),
    ],
    ids=["sparse", "huge", "parent", "absolute", "negative"],
)
def test_training_and_recaptioning_refuse_the_same(tmp_path, bad, reason, captioned):
    path = good_and(tmp_path / "x.tar", bad)
    keys, reasons = read(path)
    _, samples, problem, _ = open_shard(path)
    assert (
        reason in problem or "something in it is damaged" in problem
    )  # newer Pythons refuse negative sizes themselves
    assert keys == ["0", "1"]
    assert list(samples) == captioned
    assert reasons == {"broken or truncated shard": 1}


def test_a_truncated_tar_is_recaptioned_up_to_its_last_complete_sample(tmp_path):
    (path,) = write_shards(tmp_path, 1, 4)
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"00002.txt")])
    _, samples, problem, _ = open_shard(path)
    assert list(samples) == ["00000", "00001"]
    assert problem


def test_members_that_do_not_follow_each_other_are_a_problem(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"0.jpg": jpeg(0), "1.jpg": jpeg(1), "0.txt": b"a dog", "1.txt": b"a cat"})
    texts_first = write_tar(tmp_path / "y.tar", {"0.txt": b"a dog", "1.txt": b"a", "0.jpg": jpeg(0), "1.jpg": jpeg(1)})
    for tar in (path, texts_first):
        _, samples, problem, _ = open_shard(tar)
        assert list(samples) == ["0", "1"]
        assert problem == "the members of '1' do not follow each other"


def test_a_recaptioned_shard_holds_no_code(tmp_path):
    path = write_tar(tmp_path / "x.tar", members("0") | {"0.pickle": b"code", "0.cls": b"7"})
    shard = open_shard(path)
    assert shard.problem == ""
    write_shard(shard, tmp_path / "y.tar", {"0": ["a cat"]})
    with tarfile.open(tmp_path / "y.tar") as tar:
        written = {member.name: tar.extractfile(member).read() for member in tar}
    assert sorted(written) == ["0.cls", "0.jpg", "0.json", "0.txt"]
    assert written["0.txt"] == b"a cat"
    assert written["0.jpg"] == members("0")["0.jpg"]


def test_equal_samples_give_equal_bytes(tmp_path):
    for name in ("a.tar", "b.tar"):
        with tar_writer(tmp_path / name) as tar:
            for key in ("x", "y" * 150):
                tar.write({"__key__": key, "txt": b"a dog", "jpg": b"pixels"})
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert {(m.mtime, m.uid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, "", "", 0o644)}
    assert list(group_members(tar_members(tmp_path / "a.tar", lambda name: 10**6))) == [
        {"__key__": key, "jpg": b"pixels", "txt": b"a dog"} for key in ("x", "y" * 150)
    ]


def test_a_tar_that_is_not_finished_does_not_appear(tmp_path):
    with pytest.raises(ValueError, match="doesn't map to a bytes"), tar_writer(tmp_path / "a.tar") as tar:
        tar.write({"__key__": "x", "txt": 7})
    assert not [*tmp_path.iterdir()]


def grouped(*names: str) -> list[dict]:
    return [*group_members(Member(name, 0, 0, name.encode()) for name in names)]


def test_keys_are_those_of_webdataset():
    rng = random.Random(0)
    parts = ["".join(rng.choices("ab1 _-é", k=rng.randint(1, 3))) for _ in range(200)]
    dotted = [".".join(rng.sample(parts, rng.randint(1, 3))) for _ in range(200)]
    drawn = ["/".join([*rng.sample(dotted, rng.randint(0, 2)), rng.choice(dotted)]) for _ in range(2000)]
    for name in ("a.jpg", "./a.jpg", "a/b.c/d.seg.png", "a.", "a..jpg", "a", "a.b/c", ".a", "../.a", "", *drawn):
        key, suffix = base_plus_ext(name)
        assert grouped(name) == ([] if key is None else [{"__key__": key, suffix.lower(): name.encode()}])


def test_names_take_linear_time_and_hidden_files_are_no_samples():
    began = time.process_time()
    assert grouped("a/" * 100_000 + "a./.jpg", "a/._b.jpg") == []
    assert time.process_time() - began < 1  # webdataset takes a minute
