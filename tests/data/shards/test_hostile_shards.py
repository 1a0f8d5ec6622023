"""Shards of strangers: code, paths, bombs and names that no program expects."""

import gzip
import io
import os
import pickle
import tarfile
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coca_lit.callbacks.guards import BadSampleLog
from coca_lit.data.bad_samples import BadSample, BadSampleError, BadSamples
from coca_lit.data.batch import Batch
from coca_lit.data.records import Record
from coca_lit.data.shards.index import load_index, make_index, tar_indexes
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.data.shards.sample import pair_of
from coca_lit.data.shards.scan import read_shard
from coca_lit.data.shards.shard import MANIFEST, Shard, read_manifest, write_manifest
from coca_lit.data.shards.tar import MAX_HEADER, MAX_MEMBER
from coca_lit.errors import DataError
from coca_lit.tokenizer import get_tokenizer
from coca_lit.tools.caption.inputs import open_shard
from helpers.fuzzing import bounded, damaged, forged, fuzz
from helpers.hostile import Evil, good
from helpers.shards import jpeg, members, write_shards, write_tar

pytestmark = pytest.mark.slow

TOKENIZER = get_tokenizer("clip")


def train_on(path: Path, batches: int = 4, **more) -> tuple[set[str], list[BadSample], list[Batch]]:
    """Keys and bad samples of some batches that the training loader makes of a shard, or of all in a folder."""
    more = {"max_bad_fraction": 1.0} | more
    data = LAIONDataModule(
        shards=str(path), epoch_samples=4 * batches, tokenizer=TOKENIZER, batch_size=4, image_size=16, **more
    )
    data.prepare_data()
    seen = list(islice(data.train_dataloader(), batches))
    return (
        {key.rpartition("/")[2] for batch in seen for key in batch.keys},
        [b for batch in seen for b in batch.bad],
        seen,
    )


@pytest.mark.parametrize("scheme", ["pipe:touch {0}", "PIPE:touch {0}", "ssh://host/{0}", "file:/x/../{0}"])
def test_url_that_is_a_command(target, scheme):
    with pytest.raises(DataError, match=r"not from '[A-Za-z]+:'"):
        LAIONDataModule(shards=scheme.format(target), epoch_samples=8, tokenizer=TOKENIZER, batch_size=4).prepare_data()


def test_members_that_hold_code(tmp_path, target):
    code = pickle.dumps(Evil(target))
    names = ("evil.pyd", "evil.pickle", "evil.pkl", "evil.pth", "evil.PTH")
    keys, bad, _ = train_on(write_tar(tmp_path / "x.tar", dict.fromkeys(names, code) | good()))
    assert keys == {f"good{i}" for i in range(8)}
    assert {(found.key, found.reason) for found in bad} == {(name, "code in a shard") for name in names}


@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.txt", "/evil.jpg"])
def test_members_that_lead_out_of_the_shard(tmp_path, name):
    before = sorted(tmp_path.iterdir())
    path = write_tar(tmp_path / "x.tar", good() | {name: jpeg()})
    keys, bad, _ = train_on(path, batches=5)
    assert all(key.startswith("good") for key in keys)
    assert "leads out" in bad[0].detail
    assert sorted(tmp_path.glob("[!.]*")) == [*before, path]  # beside the index


def tar_bomb(path: Path, kind: bytes) -> Path:
    """A good start, and then a member (or header) of 4 GB of zeros in a file of a few kB."""
    info = tarfile.TarInfo("bomb.jpg")
    info.size, info.type = 4 * 2**30, kind
    start = io.BytesIO()
    with tarfile.open(fileobj=start, mode="w") as tar:
        for name, data in good().items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    whole = start.getvalue().rstrip(b"\0")
    whole += bytes(-len(whole) % 512) + info.tobuf(tarfile.GNU_FORMAT) + bytes(10 * 2**20)
    path.write_bytes(gzip.compress(whole, 1) if path.suffix == ".gz" else whole)
    return path


@pytest.mark.parametrize(
    ("kind", "limit"),
    [(tarfile.REGTYPE, MAX_MEMBER), (tarfile.GNUTYPE_LONGNAME, MAX_HEADER), (tarfile.XHDTYPE, MAX_HEADER)],
)
@pytest.mark.parametrize("name", ["bomb.tar", "bomb.tar.gz"])
def test_members_and_headers_that_claim_gigabytes(tmp_path, name, kind, limit):
    bad = BadSamples(1.0)
    found = list(read_shard(Shard(str(tar_bomb(tmp_path / name, kind))), ["txt"], bad))
    assert {record.id for record in found} <= {f"good{i}" for i in range(8)}
    assert f"{limit:,}" in bad.found[0].detail


@pytest.mark.parametrize("content", [b"1" * 10**6, b"2 " * 500_000 + b"="])
def test_headers_that_cost_time_and_memory_by_the_square_of_their_length(tmp_path, content):
    info = tarfile.TarInfo("pax")
    info.size, info.type = len(content), tarfile.XHDTYPE
    path = write_tar(tmp_path / "x.tar", good())
    header = info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)
    path.write_bytes(header + path.read_bytes())
    bad = BadSamples(1.0)
    assert not list(read_shard(Shard(str(path)), ["txt"], bad))
    assert "a header" in bad.found[0].detail


def test_xz_is_refused_by_name(tmp_path):
    (tmp_path / "x.tar.xz").touch()
    bad = BadSamples(1.0)
    assert not list(read_shard(Shard(str(tmp_path / "x.tar.xz")), ["txt"], bad))
    assert "xz is not read" in bad.found[0].detail


def test_names_that_are_not_utf8(tmp_path):
    """In a shard whose own name is none: printable keys, and a log that any file takes."""
    names = ("caf\udce9", "line\nbreak", "\x1b[2J", "fine é")
    files = {f"{name}.{end}": data for name in names for end, data in (("jpg", jpeg()), ("txt", b"a dog"))}
    files |= {"broken\udcff.jpg": b"junk", "broken\udcff.txt": b"a dog"}
    write_tar(tmp_path / "shard\udcff.tar", files | good())
    keys, bad, _ = train_on(tmp_path, batches=6)
    assert keys == {"caf\\xe9", "line\\x0abreak", "\\x1b[2J", "fine é", *(f"good{i}" for i in range(8))}
    assert {(found.shard, found.key) for found in bad} == {(f"{tmp_path}/shard\\xff.tar", "broken\\xff")}
    log = BadSampleLog(tmp_path)
    for _ in range(2):  # also of a run that resumes
        log.on_train_start(None, None)
        log.on_train_batch_end(None, None, None, SimpleNamespace(bad=bad), 0)
        log.on_train_end(None, None)
    assert len((tmp_path / "bad_samples" / "rank0.csv").read_text().splitlines()) == 1
    assert "shard\\xff.tar,unreadable image,1" in (tmp_path / "bad_samples" / "shards.csv").read_text()


def test_two_members_of_the_same_name_cost_their_sample_alone(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in [("twice.jpg", jpeg()), ("twice.txt", b"a"), ("twice.JPG", jpeg(9)), *good().items()]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    keys, bad, _ = train_on(path, batches=4)
    assert keys == {f"good{i}" for i in range(8)}
    assert {found[1:] for found in bad} == {("twice", "two members of the same name", "twice.JPG")}
    assert list(open_shard(path).samples) == [f"good{i}" for i in range(8)]


def test_torn_shards_are_no_small_loss(tmp_path):
    image = jpeg()
    files = {f"{i}.{end}": data for i in range(600) for end, data in (("jpg", image), ("txt", b"a dog"))}
    for name in "abc":  # 4 % of each are left
        content = write_tar(tmp_path / f"{name}.tar", files).read_bytes()
        (tmp_path / f"{name}.tar").write_bytes(content[: len(content) // 25])
    with pytest.raises(DataError, match=r"torn.*max_bad_fraction=0\.05 .*: 3 of 3 shards"):
        train_on(tmp_path, batches=20, max_bad_fraction=0.05)


def test_json_bomb(tmp_path):
    bomb = {"bomb.jpg": jpeg(), "bomb.json": b'{"caption": ' + b"[" * 100_000}
    path = write_tar(tmp_path / "x.tar", bomb | good("json", b'{"caption": "a dog"}'))
    data = LAIONDataModule(
        shards=str(path),
        epoch_samples=8,
        tokenizer=TOKENIZER,
        batch_size=4,
        image_size=16,
        caption_keys="caption",
        max_bad_fraction=0.5,
    )
    assert "bomb" not in {key for batch in data.train_dataloader() for key in batch.keys}


def test_captions_that_hold_special_tokens(tmp_path):
    caption = b"<start_of_text>a dog<end_of_text> <|endoftext|> a cat</s>"
    *_, (batch, *_) = train_on(write_tar(tmp_path / "x.tar", good(text=caption)))
    for tokens, length in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True):
        real = tokens[:length]
        assert (real[0], real[-1]) == (TOKENIZER.sot_id, TOKENIZER.eot_id)
        assert not {TOKENIZER.sot_id, TOKENIZER.eot_id} & set(real[1:-1])
        assert "end_of_text" in TOKENIZER.decode(real).replace(" ", "")


def test_a_fifo_is_no_shard_and_no_index(tmp_path):
    path = write_tar(tmp_path / "x.tar", good())
    os.mkfifo(tmp_path / ".x.tar.index")
    assert len(tar_indexes([Shard(str(path))], tmp_path)[0]) == 8
    path.unlink()
    os.mkfifo(path)
    bad = BadSamples(1.0)
    assert not list(read_shard(Shard(str(path)), ["txt"], bad))
    assert "not a regular file" in bad.found[0].detail


def _tars() -> list[bytes]:
    """In the formats of GNU and POSIX, with names that need a header of their own and names that are not UTF-8."""
    import tarfile

    made = []
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
            for key in ("a", "caf\udce9", "long" * 40):
                for name, data in members(key.encode(errors="surrogateescape").decode(errors="replace")).items():
                    info = tarfile.TarInfo(key + name[name.rindex(".") :])
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        made.append(buffer.getvalue())
    return made


@fuzz
@given(st.data())
def test_forged_shards(forged_files, data):
    content = data.draw(st.sampled_from(_tars()).flatmap(damaged))
    packed = data.draw(st.booleans())
    path = forged_files / f"x.tar{'.gz' if packed else ''}"
    path.write_bytes(data.draw(damaged(gzip.compress(content, 1))) if packed and len(content) % 2 else content)
    if packed and not len(content) % 2:
        path.write_bytes(gzip.compress(content, 1))
    with bounded():
        bad = BadSamples(1.0)
        samples = list(read_shard(Shard(str(path)), ["txt", "caption"], bad))
        for found in (*samples, *bad.found):
            assert str(found.id if isinstance(found, Record) else found.key).isprintable()
        assert bad.seen >= len(samples)
    if packed:
        return
    with bounded():
        index, pairs = make_index(Shard(str(path)), forged_files), []
        for i in range(len(index)):
            with suppress(BadSampleError):
                pairs.append(pair_of(index.read(i), ["txt", "caption"], str(path))[0])
        assert pairs == [sample.image.content for sample in samples]
    with bounded():
        open_shard(path)


@fuzz
@given(st.data())
def test_forged_indexes(forged_files, data):
    (path,) = write_shards(forged_files, 1, 3)
    os.utime(path, ns=(1, 1))
    shard, index = Shard(str(path)), forged_files / ".00000.tar.index"
    index.unlink(missing_ok=True)
    make_index(shard, forged_files)
    index.write_bytes(data.draw(damaged(index.read_bytes())))
    with bounded():
        if found := load_index(shard, forged_files):
            for i in range(len(found)):
                assert found.read(i)["__key__"] == found.key(i)


@fuzz
@given(st.data())
def test_forged_manifests(forged_files, data):
    entries = {f"{i}.tar": {"name": f"{i}.tar", "samples": i, "bytes": 2 * i, "sha256": "0" * 64} for i in range(3)}
    document = {"samples": 3, "bytes": 6, "shards": [*entries.values()]}
    (forged_files / MANIFEST).write_bytes(data.draw(forged(document)))
    with bounded():
        write_manifest(forged_files / "again", read_manifest(forged_files))
